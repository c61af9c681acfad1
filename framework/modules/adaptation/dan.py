"""Multi-kernel maximum mean discrepancy between the domains' features.

Long et al., "Learning Transferable Features with Deep Adaptation Networks", ICML 2015; the estimators are those of
Gretton et al., "A Kernel Two-Sample Test", JMLR 2012.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import MMDEstimator, biased_mmd, linear_time_mmd, unbiased_mmd
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.modules.adaptation.batches import check_batch_sizes
from framework.networks import NetworkOutputs

ESTIMATORS = {"biased": biased_mmd, "unbiased": unbiased_mmd, "linear_time": linear_time_mmd}


class MaximumMeanDiscrepancyLoss(AlignmentLoss):
    """Squared maximum mean discrepancy of the features under a sum of Gaussian kernels (Long 2015, eq. 1 to 3).

    Diagnostics: ``mmd``, the estimate itself; only the biased one cannot be negative.

    Args:
        estimator: ``biased`` (all pairs; Gretton 2012, eq. 5), ``unbiased`` (all pairs but an image with itself; eq.
            3), or ``linear_time`` (disjoint pairs, section 6; needs equal batches of both domains).
        kernel_scales: widths of the kernels as multiples of the mean squared distance in the batch.
    """

    term = "dan"

    def __init__(
        self, estimator: MMDEstimator = "unbiased", kernel_scales: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0)
    ) -> None:
        super().__init__()
        if estimator not in ESTIMATORS:
            raise ConfigurationError(
                f"Expected `--model.estimator` to be one of {', '.join(ESTIMATORS)}, but got {estimator!r}."
            )
        if not kernel_scales or min(kernel_scales) <= 0:
            raise ConfigurationError(
                f"Expected `--model.kernel_scales` to be numbers above 0, but got {list(kernel_scales)}."
            )
        self.estimate, self.kernel_scales = ESTIMATORS[estimator], tuple(kernel_scales)

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The estimate, a scalar; ``progress`` plays no part."""
        mmd = self.estimate(source.features, target.features, scales=self.kernel_scales)
        self.diagnostics = {"mmd": mmd.detach()}
        return mmd


class DAN(DomainAdaptation):
    """Deep adaptation network (Long et al., ICML 2015), with the alignment on the bottleneck's features.

    Args:
        num_classes: number of classes ``K``.
        estimator: of the squared maximum mean discrepancy, ``biased``, ``unbiased`` or ``linear_time`` (the paper's).
        kernel_scales: widths of the Gaussian kernels as multiples of the mean squared distance in the batch.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        estimator: MMDEstimator = "unbiased",
        kernel_scales: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0),
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.alignment = MaximumMeanDiscrepancyLoss(estimator, kernel_scales)
        self.estimator = estimator

    def prepare_data(self) -> None:
        """Refuse batches that the estimator cannot take."""
        super().prepare_data()
        linear_time = "--model.estimator linear_time" if self.estimator == "linear_time" else ""
        check_batch_sizes(self, at_least=2, why="between which DAN measures distances", equal_for=linear_time)
