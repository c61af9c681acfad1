"""What the self-supervised tasks share: a backbone learns from images without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from framework.batch import UnlabelledBatch
from framework.inspection import undisturbed
from framework.modules.backbone_module import BackboneModule
from framework.networks.batch_norm import batch_norms, own_statistics

Encoder = Callable[[Tensor], Tensor]
"""Images ``[N, 3, H, W]`` to features ``[N, C]``."""


class Preview(NamedTuple):
    """What a task made of some images and what the network answered, to be looked at.

    Attributes:
        pictures: a row of ``P`` pictures for each image, ``[N, P, 3, H, W]``, normalised as the network's images.
        captions: the text below each picture, ``N`` lists of ``P``; empty where a picture needs none.
    """

    pictures: Tensor
    captions: list[list[str]]


class PretextTask(nn.Module):
    """A task that images set themselves: ``forward(encode, images) -> scalar``.

    A plain module of tensors, usable in any training loop; its parameters are those of the task's own head. The same
    task pre-trains a backbone alone or goes beside a classifier's loss (:mod:`framework.modules.adaptation`).

    Attributes:
        changes_images: the network sees other images than a classifier will: rotated, shuffled or masked ones.
        views: how many views of an image it takes.
        diagnostics: what the last forward measured, detached 0-d tensors by name, which are not written to afterwards.
    """

    changes_images: ClassVar[bool] = False
    views: ClassVar[int] = 1

    def __init__(self) -> None:
        super().__init__()
        self.diagnostics: dict[str, Tensor] = {}

    def forward(self, encode: Encoder, images: Tensor) -> Tensor:
        """The loss, a mean over the images.

        Args:
            encode: the backbone, ``[N, 3, H, W]`` to ``[N, C]``.
            images: shape ``[N, 3, H, W]``; a task that compares views takes ``[N, views, 3, H, W]``.
        """
        raise TypeError(f"{type(self).__name__} has no forward")

    def try_images(self, encode: Encoder, image_size: int) -> None:
        """Set the task once on two black images, so that options that do not suit the size show before training."""
        images = next(self.parameters()).new_zeros((2, *([self.views] if self.views > 1 else []), 3, *2 * [image_size]))
        with undisturbed(self):
            self(encode, images)

    def preview(self, encode: Encoder, images: Tensor) -> Preview:
        """The task's pictures of some images, with the network's answers; by default the images themselves."""
        pictures = images if images.dim() == 5 else images[:, None]
        return Preview(pictures, [[""] * pictures.shape[1] for _ in pictures])


class PretrainingModule(BackboneModule):
    """Base of self-supervised pre-training: a backbone and the head of a task, trained on images without labels.

    A method sets ``self.task`` and is done. Its checkpoint starts any classifier or adaptation method:
    ``--model.init_from``.

    Args:
        backbone_learning_rate_factor: the backbone learns at this multiple of ``learning_rate``.
        options: those of :class:`~framework.modules.backbone_module.BackboneModule`.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    batch_type: ClassVar[type] = UnlabelledBatch

    task: PretextTask

    def __init__(self, *, backbone_learning_rate_factor: float = 1.0, **options: Any) -> None:
        super().__init__(backbone_learning_rate_factor=backbone_learning_rate_factor, **options)

    def prepare_data(self) -> None:
        """Refuse images that do not suit the task, too; its validation has as many views as training."""
        super().prepare_data()
        if self.trainer.state.fn == "validate":
            self.check_views()
        image_size = getattr(self.trainer.datamodule, "image_size", None)  # type: ignore[attr-defined]
        if image_size is not None and self.trainer.state.fn == "fit":
            with undisturbed(self):
                self.task.try_images(self.encode, image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[N, C]`` of images ``[N, 3, H, W]``."""
        features: Tensor = self.backbone(images)
        return features

    def encode(self, images: Tensor) -> Tensor:
        """Features ``[N, C]`` of the task's images ``[N, 3, H, W]``.

        Where these are not images as a classifier will see them, batch norms take the batch's own statistics, in
        evaluation too, and their running ones are left to :meth:`training_step`.
        """
        if not self.task.changes_images:
            return self(images)  # type: ignore[no-any-return]
        with own_statistics(self.backbone):
            return self(images)  # type: ignore[no-any-return]

    def training_step(self, batch: UnlabelledBatch, batch_idx: int) -> Tensor | None:
        """The task's loss; the running statistics of batch norms, which a checkpoint hands on, are of the images
        themselves."""
        loss: Tensor = self.task(self.encode, batch.images)
        if self.task.changes_images and batch_norms(self.backbone):
            with torch.no_grad():
                self(batch.images)
        return self.logged_loss(loss, **self.task.diagnostics)

    def validation_step(self, batch: UnlabelledBatch, batch_idx: int) -> None:
        """The task's loss and what it measures, with the same draws at every validation.

        A single image that remains for the last batch is left out: it has no other to be compared or normalised with.
        """
        if len(batch.images) == 1 and batch_idx > 0:
            return
        self.reseed(self.global_rank, batch=batch_idx)
        loss = self.task(self.encode, batch.images)
        values = {"val/loss": loss} | {f"val/{name}": value for name, value in self.task.diagnostics.items()}
        self.log_dict(values, sync_dist=True, prog_bar=True, batch_size=len(batch.images))

    def preview(self, images: Tensor) -> Preview:
        """Pictures of the task and of what the network makes of it, of images as a batch holds them."""
        return self.task.preview(self.encode, images)
