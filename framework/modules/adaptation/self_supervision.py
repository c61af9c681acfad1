"""Self-supervised tasks beside the classification of the source: both domains learn them, so they share features.

Sun et al., "Unsupervised Domain Adaptation through Self-Supervision", 2019, arXiv:1909.11825; Xu, Xiao & López,
"Self-Supervised Domain Adaptation for Computer Vision Tasks", IEEE Access 2019, arXiv:1907.10915.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.functional.masking import Norm
from framework.modules.adaptation.base import AlignmentLoss
from framework.modules.pretraining.base import Encoder, PretextTask
from framework.modules.pretraining.jigsaw_prediction import Arrangement, JigsawTask
from framework.modules.pretraining.masked_image_reconstruction import MaskedImageTask
from framework.modules.pretraining.rotation_prediction import Rotations, RotationTask
from framework.networks import NetworkOutputs
from framework.networks.batch_norm import running_statistics_kept

Domains = Literal["both", "target"]
Passes = Callable[[list[Tensor]], list[tuple[Encoder, Tensor]]]
"""Images of source and target, or of the target alone, to the passes through the backbone that they take: one for both
where the domains share their batch statistics, otherwise one for each."""


class SelfSupervisedLoss(AlignmentLoss):
    """A pretext task on the images of both domains, as a term beside others; labels and predictions play no part.

    Each process takes its own images: a mean over images needs no others. The task's images go through the backbone a
    second time, and leave its running batch-norm statistics alone: these are of images as evaluation sees them.

    Diagnostics: those of the task.

    Args:
        task: the task; its head learns with the loss.
        passes: the way through the backbone, see :data:`Passes`.
        domains: whose images: ``both`` (Sun 2019), or the ``target``'s alone.
    """

    is_task = True

    def __init__(self, task: PretextTask, passes: Passes, domains: Domains = "both") -> None:
        super().__init__()
        if domains not in get_args(Domains):
            raise ConfigurationError(f"Expected `domains` to be 'both' or 'target', but got {domains!r}.")
        self.task, self.passes, self.domains = task, passes, domains

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The task's mean loss over the images, a scalar; both outputs need their ``images``."""
        if source.images is None or target.images is None:
            raise ValueError("Expected source and target with their images, but got none.")
        images = [source.images, target.images] if self.domains == "both" else [target.images]
        total = sum(len(part) for part in images)
        values: list[Tensor] = []
        self.diagnostics = {}
        for encode, part in self.passes(images):
            share = len(part) / total
            values.append(share * self.task(encode, part))
            for name, value in self.task.diagnostics.items():
                self.diagnostics[name] = self.diagnostics.get(name, 0) + share * value
        return torch.stack(values).sum()

    def try_images(self, image_size: int) -> None:
        """Set the task on black images, with whatever it needs of the backbone."""
        black = next(self.task.parameters()).new_zeros(2, 3, image_size, image_size)
        ((encode, _),) = self.passes([black])
        self.task.try_images(encode, image_size)


class RotationLoss(SelfSupervisedLoss):
    """Rotation prediction as a term (Gidaris et al. 2018; in adaptation Sun et al. 2019, Xu et al. 2019).

    Args:
        backbone: the network that ``passes`` goes through.
        passes: see :class:`SelfSupervisedLoss`; default: one pass of all images through ``backbone``.
        rotations: ``random``, one an image, or ``all`` four.
        domains: whose images, ``both`` or ``target``.
    """

    term = "rotation"

    def __init__(
        self,
        backbone: nn.Module,
        passes: Passes | None = None,
        rotations: Rotations = "random",
        domains: Domains = "both",
    ) -> None:
        task = RotationTask(int(backbone.num_features), rotations)  # type: ignore[arg-type]
        super().__init__(task, passes or one_pass(backbone), domains)


class JigsawLoss(SelfSupervisedLoss):
    """Jigsaw puzzles as a term (Noroozi & Favaro 2016, Carlucci et al. 2019; in adaptation Xu et al. 2019).

    Args:
        backbone: the network that ``passes`` goes through.
        passes: see :class:`SelfSupervisedLoss`; default: one pass of all images through ``backbone``.
        grid, permutations, arrangement, ordered, gap, normalize_pieces: see
            :class:`~framework.modules.pretraining.jigsaw_prediction.JigsawTask`.
        domains: whose images, ``both`` or ``target``.
    """

    term = "jigsaw"

    def __init__(
        self,
        backbone: nn.Module,
        passes: Passes | None = None,
        grid: int = 3,
        permutations: int = 30,
        arrangement: Arrangement = "image",
        ordered: bool = True,
        gap: int = 0,
        normalize_pieces: bool = False,
        domains: Domains = "both",
    ) -> None:
        features = int(backbone.num_features)  # type: ignore[arg-type]
        task = JigsawTask(features, grid, permutations, arrangement, ordered, gap, normalize_pieces)
        super().__init__(task, passes or one_pass(backbone), domains)


class MaskingLoss(SelfSupervisedLoss):
    """Masked image reconstruction as a term (Pathak et al. 2016, Xie et al. 2022).

    Args:
        backbone: the network that ``passes`` goes through, and whose last spatial map is caught.
        passes: see :class:`SelfSupervisedLoss`; default: one pass of all images through ``backbone``.
        block_size, mask_ratio, norm: see
            :class:`~framework.modules.pretraining.masked_image_reconstruction.MaskedImageTask`.
        domains: whose images, ``both`` or ``target``.
    """

    term = "masking"

    def __init__(
        self,
        backbone: nn.Module,
        passes: Passes | None = None,
        block_size: int = 32,
        mask_ratio: float = 0.6,
        norm: Norm = "l1",
        domains: Domains = "both",
    ) -> None:
        task = MaskedImageTask(backbone, block_size=block_size, mask_ratio=mask_ratio, norm=norm)
        super().__init__(task, passes or one_pass(backbone), domains)


def one_pass(backbone: nn.Module) -> Passes:
    """All images through ``backbone`` at once, which leaves its running batch-norm statistics alone."""
    return partial(_pass, partial(_features, backbone))  # no closure: a copy of the loss goes through a copied backbone


def _pass(encode: Encoder, images: list[Tensor]) -> list[tuple[Encoder, Tensor]]:
    return [(encode, torch.cat(images))]


def _features(backbone: nn.Module, images: Tensor) -> Tensor:
    with running_statistics_kept(backbone):
        features: Tensor = backbone(images)
    return features
