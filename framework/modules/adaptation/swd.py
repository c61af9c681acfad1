"""Sliced Wasserstein discrepancy: MCD with the geometry of the two heads' predictions.

Lee et al., "Sliced Wasserstein Discrepancy for Unsupervised Domain Adaptation", CVPR 2019, arXiv:1903.04064.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import full_precision, random_directions, sliced_wasserstein
from framework.modules.adaptation.mcd import MCD


class SWD(MCD):
    """Sliced Wasserstein discrepancy (Lee et al., CVPR 2019): the steps of MCD, with another discrepancy.

    That is the sliced Wasserstein distance of order 2 between the predictions of the two heads over the batch of target
    images (algorithm 1 there): it compares the two clouds of predictions, not the two predictions of an image. With
    several processes it is that of all their images, where ``global_alignment`` is on.

    Logs what MCD logs.

    Args:
        num_classes: number of classes ``K``.
        projections: directions that the predictions are projected on, drawn anew at each step.
        options: those of :class:`~framework.modules.adaptation.MCD`.
    """

    def __init__(self, num_classes: int, *, projections: int = 128, **options: Any) -> None:
        super().__init__(num_classes, **options)
        if projections < 1:
            raise ConfigurationError(f"Expected `--model.projections` to be at least 1, but got {projections}.")
        self.projections = projections

    def discrepancy(self, first: Tensor, second: Tensor) -> Tensor:
        """Of the two heads' logits ``[M, K]`` on the target, a scalar."""
        return _distance(first, second, self.projections)


@full_precision
def _distance(first: Tensor, second: Tensor, projections: int) -> Tensor:
    return sliced_wasserstein(first.softmax(dim=1), second.softmax(dim=1), random_directions(projections, first))
