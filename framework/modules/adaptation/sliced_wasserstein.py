"""Sliced Wasserstein distance between the domains' features.

Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", Journal of Mathematical Imaging and Vision 2015;
as a loss of domain adaptation in Gabourie et al., "Learning a Domain-Invariant Embedding for Unsupervised Domain
Adaptation Using Class-Conditioned Distribution Alignment", Allerton 2019, arXiv:1907.02271.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import random_directions, sliced_wasserstein
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs


class SlicedWassersteinLoss(AlignmentLoss):
    """Mean over random directions of the Wasserstein distance, to its power, of the projected features.

    A shift of the features counts by its squared length over ``D`` (order 2), so the loss is small where they are wide.
    Diagnostics: ``sliced_wasserstein``, and ``relative_sliced_wasserstein``, the same over that of all features to
    their mean: 0 where the domains are alike but for chance, above 1 where they lie apart.

    Args:
        projections: number of directions, drawn anew at each step.
        order: p, 1 or 2: the mean absolute or squared difference of the sorted projections.
    """

    term = "sliced_wasserstein"

    def __init__(self, projections: int = 128, order: int = 2) -> None:
        super().__init__()
        if projections < 1:
            raise ConfigurationError(f"Expected `--model.projections` to be at least 1, but got {projections}.")
        if order not in (1, 2):
            raise ConfigurationError(f"Expected `--model.order` to be 1 or 2, but got {order!r}.")
        self.projections, self.order = projections, order

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The distance, a scalar; ``progress`` plays no part."""
        directions = random_directions(self.projections, source.features)
        distance = sliced_wasserstein(source.features, target.features, directions, self.order)
        joint = torch.cat([source.features, target.features]).detach()
        spread = sliced_wasserstein(joint, joint.mean(dim=0, keepdim=True), directions, self.order)
        self.diagnostics = {
            "sliced_wasserstein": distance.detach(),
            "relative_sliced_wasserstein": distance.detach() / spread.clamp(min=1e-30),
        }
        return distance

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """Domains that still lie apart late in the run."""
        relative = means.get("train/relative_sliced_wasserstein", 0.0)
        if progress >= 0.5 and relative > 1.0:
            yield (
                "sliced_wasserstein",
                f"the features of the domains lie {relative:.2f} times their own spread apart "
                "(`train/relative_sliced_wasserstein`). Raise `--model.trade_off`.",
            )


class SlicedWasserstein(DomainAdaptation):
    """Alignment of the features by their sliced Wasserstein distance (Bonneel et al. 2015; Gabourie et al. 2019).

    Args:
        num_classes: number of classes ``K``.
        projections: number of random directions a step.
        order: p of the distance, 1 or 2.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(self, num_classes: int, *, projections: int = 128, order: int = 2, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.alignment = SlicedWassersteinLoss(projections, order)
