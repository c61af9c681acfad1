"""VICReg: two views of an image have the same embedding, and embeddings keep all their dimensions.

Bardes, Ponce & LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022,
arXiv:2105.04906.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framework.errors import at_least_zero
from framework.functional import full_precision, vicreg_terms
from framework.modules.pretraining.base import Encoder, PretrainingModule
from framework.modules.pretraining.two_views import ComparesImages, Gather, Normalization, TwoViewTask


class VICRegTask(TwoViewTask):
    """Weighted sum of the embeddings' invariance, variance and covariance.

    The terms are those of :func:`~framework.functional.vicreg_terms`. Diagnostics: ``invariance``, ``variance`` and
    ``covariance``, the terms without their weights, and ``embedding_std``, the mean standard deviation of the
    embeddings' dimensions over the batch: about 1 where the variance term is met, near 0 where all images have the same
    embedding (collapse).

    Args:
        num_features: width ``C`` of the backbone's features.
        invariance_weight: of the mean squared difference of both views.
        variance_weight: of the hinge that holds each dimension's standard deviation at 1 or above.
        covariance_weight: of the squared covariances of different dimensions.
        projection_features: width of the embeddings and of the expander's hidden layers.
        projection_layers: linear layers of the expander.
        projection_normalization: of its hidden layers, ``batch`` or ``none``.
        gather: see :class:`~framework.modules.pretraining.two_views.TwoViewTask`.
    """

    def __init__(
        self,
        num_features: int,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        projection_features: int = 2048,
        projection_layers: int = 3,
        projection_normalization: Normalization = "batch",
        gather: Gather | None = None,
    ) -> None:
        super().__init__(
            num_features, projection_features, projection_features, projection_layers, projection_normalization, gather
        )
        at_least_zero("--model.invariance_weight", invariance_weight)
        at_least_zero("--model.variance_weight", variance_weight)
        at_least_zero("--model.covariance_weight", covariance_weight)
        self.weights = (invariance_weight, variance_weight, covariance_weight)

    def forward(self, encode: Encoder, images: Tensor) -> Tensor:
        """The weighted sum, a scalar, of images ``[N, 2, 3, H, W]``."""
        first, second = self.projections(encode, images)
        terms = vicreg_terms(first, second)
        names = ("invariance", "variance", "covariance")
        self.diagnostics = {name: term.detach() for name, term in zip(names, terms, strict=True)}
        self.diagnostics["embedding_std"] = _mean_deviation(first.detach(), second.detach())
        return torch.stack([weight * term for weight, term in zip(self.weights, terms, strict=True)]).sum()


@full_precision
def _mean_deviation(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second]).std(dim=1).mean()


class VICReg(ComparesImages, PretrainingModule):
    """Pre-training by variance, invariance and covariance (Bardes et al., ICLR 2022). Needs ``--data.views 2``.

    No image is pushed away from another one, and no second network follows slowly: the embedding cannot collapse since
    each of its dimensions must vary, and vary in a way of its own. With several processes the loss in training is that
    of the images of all. Batch norms see their own process's images alone unless ``--trainer.sync_batchnorm true``, as
    in the published code; they see both views at once, where that code runs one view after the other.

    The paper's expander is 8192 wide, four times the features of its ResNet-50, and has 151 million weights there. The
    default of 2048 is four times the features of a resnet18 and has 9 million; by the same rule resnet8 takes 256.

    Args:
        invariance_weight: of the mean squared difference of both views.
        variance_weight: of the hinge on the dimensions' standard deviation, summed over both views; the published code
            takes the mean of both, which is 12.5 here.
        covariance_weight: of the squared covariances.
        projection_features: width of the embeddings and of the expander's hidden layers.
        projection_layers: linear layers of the expander.
        projection_normalization: of its hidden layers, ``batch`` or ``none``.
        options: those of :class:`~framework.modules.pretraining.PretrainingModule`.
    """

    def __init__(
        self,
        *,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        projection_features: int = 2048,
        projection_layers: int = 3,
        projection_normalization: Normalization = "batch",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.task = VICRegTask(
            self.num_features,
            invariance_weight,
            variance_weight,
            covariance_weight,
            projection_features,
            projection_layers,
            projection_normalization,
            gather=self.of_all_processes,
        )
