"""What the tasks share that compare two views of each image, with each other and with those of other images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import unit_length
from framework.modules.backbone_module import BackboneModule
from framework.modules.pretraining.base import Encoder, PretextTask, Preview
from framework.networks import ProjectionHead

Normalization = Literal["batch", "none"]
Gather = Callable[[Tensor], Tensor]
"""Rows of this process to the rows of all processes, with gradients."""


class TwoViewTask(PretextTask):
    """Base of tasks on the projections of two views of each image.

    Both views go through backbone and projection head in one pass, so that their batch norms see both at once.

    Args:
        num_features: width ``C`` of the backbone's features.
        hidden_features: width of the projection's hidden layers.
        projection_features: width ``D`` of the projections.
        projection_layers: linear layers of the projection head.
        projection_normalization: of its hidden layers, ``batch`` or ``none``.
        gather: gives the rows of all processes, so that a loss in training is that of the whole batch; by default each
            process has a loss of its own. Not used in evaluation, where processes may have unequal numbers of images.
    """

    views: ClassVar[int] = 2

    def __init__(
        self,
        num_features: int,
        hidden_features: int,
        projection_features: int,
        projection_layers: int,
        projection_normalization: Normalization,
        gather: Gather | None,
    ) -> None:
        super().__init__()
        for flag, value in (("projection_features", projection_features), ("projection_layers", projection_layers)):
            if value < 1:
                raise ConfigurationError(f"Expected `--model.{flag}` to be at least 1, but got {value}.")
        if projection_normalization not in ("batch", "none"):
            raise ConfigurationError(
                f"Expected `--model.projection_normalization` to be 'batch' or 'none', but got "
                f"{projection_normalization!r}."
            )
        self.projector = ProjectionHead(
            num_features, hidden_features, projection_features, projection_layers, projection_normalization
        )
        self.gather = gather

    def projections(self, encode: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
        """Projections ``[N, D]`` of the first and of the second views of images ``[N, 2, 3, H, W]``.

        In training with several processes they are of the images of all.
        """
        projected = self._projected(encode, images)
        if self.training and self.gather is not None:
            projected = self.gather(projected)
        return projected[:, 0], projected[:, 1]

    def _projected(self, encode: Encoder, images: Tensor) -> Tensor:
        """Of this process's images, ``[N, 2, D]``."""
        if images.dim() != 5 or images.shape[1] != 2:
            raise ConfigurationError(
                f"Expected two views of each image, [N, 2, 3, H, W] (`--data.views 2`), but got {list(images.shape)}."
            )
        projected: Tensor = self.projector(encode(images.flatten(0, 1)))
        return projected.reshape(len(images), 2, -1)

    def preview(self, encode: Encoder, images: Tensor) -> Preview:
        """Both views of each image, below the second the cosine of their projections."""
        views = self._projected(encode, images)
        cosines = (unit_length(views[:, 0]) * unit_length(views[:, 1])).sum(dim=1).tolist()
        return Preview(images, [["", f"cosine {cosine:.2f}"] for cosine in cosines])


class ComparesImages(BackboneModule):
    """What a module with a :class:`TwoViewTask` asks of the data; named before PretrainingModule among its bases."""

    views: ClassVar[tuple[int, ...]] = (2,)

    def prepare_data(self) -> None:
        """Refuse batches of one image, which has no other to be compared with."""
        super().prepare_data()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        for flag, processes in (("batch_size", self.trainer.world_size), ("eval_batch_size", 1)):
            size = getattr(data, flag, 2)
            if size * processes < 2:
                raise ConfigurationError(
                    f"Expected `--data.{flag}` to be at least 2 for {type(self).__name__}, which compares the images "
                    f"of a batch, but got {size}."
                )
