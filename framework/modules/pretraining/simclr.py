"""SimCLR: which of all views in the batch is of the same image?

Chen, Kornblith, Norouzi & Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
arXiv:2002.05709.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import full_precision, nt_xent, unit_length
from framework.modules.pretraining.base import Encoder, PretrainingModule
from framework.modules.pretraining.two_views import ComparesImages, Gather, Normalization, TwoViewTask


class SimCLRTask(TwoViewTask):
    """Cross-entropy of finding an image's other view among all views of the batch, by the cosine of projections.

    Diagnostics: ``contrast_accuracy``, the share of views whose nearest one is the other view of their image;
    ``alignment``, the mean squared distance of both, and ``uniformity``, the logarithm of the mean of
    ``exp(-2 * squared distance)`` over views of different images, both of projections of length 1 (Wang & Isola, ICML
    2020, arXiv:2005.10242): 0 where all projections are the same, and the lower the more evenly they are spread.

    Args:
        num_features: width ``C`` of the backbone's features, and of the projection's hidden layers.
        temperature: of the softmax.
        projection_features: width of the projections.
        projection_layers: linear layers of the projection head.
        projection_normalization: of its hidden layers, ``batch`` or ``none``.
        gather: see :class:`~framework.modules.pretraining.two_views.TwoViewTask`.
    """

    def __init__(
        self,
        num_features: int,
        temperature: float = 0.5,
        projection_features: int = 128,
        projection_layers: int = 2,
        projection_normalization: Normalization = "batch",
        gather: Gather | None = None,
    ) -> None:
        super().__init__(
            num_features, num_features, projection_features, projection_layers, projection_normalization, gather
        )
        if temperature <= 0:
            raise ConfigurationError(f"Expected `--model.temperature` to be above 0, but got {temperature}.")
        self.temperature = temperature

    def forward(self, encode: Encoder, images: Tensor) -> Tensor:
        """The mean over all views, a scalar, of images ``[N, 2, 3, H, W]``."""
        first, second = self.projections(encode, images)
        loss = nt_xent(first, second, self.temperature)
        self.diagnostics = contrast_diagnostics(first.detach(), second.detach())
        return loss


@full_precision
def contrast_diagnostics(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """What :class:`SimCLRTask` measures of the projections ``[N, D]`` of both views, 0-d tensors by name."""
    first, second = unit_length(first), unit_length(second)
    views = torch.cat([first, second])
    itself = torch.arange(len(views), device=views.device)
    other_view = itself.roll(len(first))
    similarities = views @ views.T
    similarities[itself, itself] = -torch.inf
    found = (similarities.argmax(dim=1) == other_view).float().mean()
    similarities[itself, other_view] = -torch.inf
    pairs = len(views) * (len(views) - 2)
    return {
        "contrast_accuracy": found,
        "alignment": (first - second).square().sum(dim=1).mean(),
        # the squared distance is 2 - 2 * similarity
        "uniformity": (4.0 * similarities - 4.0).flatten().logsumexp(dim=0) - math.log(pairs),
    }


class SimCLR(ComparesImages, PretrainingModule):
    """Contrastive pre-training with two views of each image (Chen et al., ICML 2020). Needs ``--data.views 2``.

    It learns not to see what the augmentations change, and to tell an image from the others of its batch: 4096 in the
    paper, which finds that smaller batches need more epochs. With several processes the loss in training is that of the
    views of all. Batch norms see their own process's images alone unless ``--trainer.sync_batchnorm true``, as in the
    paper.

    The validation loss depends on ``--data.eval_batch_size`` in the same way; a single image that remains for the last
    batch is left out.

    Args:
        temperature: of the softmax over the other views: 0.1 in the paper on ImageNet, 0.5 on CIFAR-10.
        projection_features: width of the projections that are compared.
        projection_layers: linear layers of the projection head; those before the last are as wide as the backbone's
            features.
        projection_normalization: of these, ``batch`` (the published code) or ``none``.
        options: those of :class:`~framework.modules.pretraining.PretrainingModule`.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        projection_features: int = 128,
        projection_layers: int = 2,
        projection_normalization: Normalization = "batch",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.task = SimCLRTask(
            self.num_features,
            temperature,
            projection_features,
            projection_layers,
            projection_normalization,
            gather=self.of_all_processes,
        )
