"""Joint maximum mean discrepancy: features and predictions are aligned together, as one joint distribution.

Long et al., "Deep Transfer Learning with Joint Adaptation Networks", ICML 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError, at_least_zero
from framework.functional import (
    FIVE_SCALES,
    MMDEstimator,
    full_precision,
    full_precision_matmul,
    joint_mmd,
    reversal_coefficient,
    reverse_gradient,
)
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.modules.adaptation.batches import check_batch_sizes
from framework.networks import NetworkOutputs


class JointMaximumMeanDiscrepancyLoss(AlignmentLoss):
    """Squared joint maximum mean discrepancy of features and class probabilities (Long 2017, section 3).

    The kernel of two images is that of their features (a sum of Gaussian kernels) times that of their probabilities
    (one Gaussian kernel). Gradients flow through both: so do the paper's, which adapts all layers of the product.

    ``adversarial`` (JAN-A) puts a linear map before each kernel, which is trained to raise the
    discrepancy that the network lowers. It starts as the identity, and has no bias, which distances do not see.

    Diagnostics: ``joint_mmd``, the estimate (only the biased one cannot be negative); ``ramp``, its weight by the
    schedule; with ``adversarial`` also ``adversary``, how far the maps are from the identity, relative to it.

    Args:
        num_features: width ``D`` of the features.
        num_classes: number of classes ``K``.
        estimator: ``biased``, ``unbiased`` or ``linear_time``, as of DAN.
        kernel_scales: widths of the features' kernels as multiples of the mean squared distance in the batch.
        probability_width: standard deviation of the probabilities' kernel.
        ramp_gamma: the loss is weighted by ``2 / (1 + exp(-gamma * progress)) - 1``; 0 weighs it 1 throughout.
        adversarial: JAN-A.
    """

    term = "jan"

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        estimator: MMDEstimator = "unbiased",
        kernel_scales: Sequence[float] = FIVE_SCALES,
        probability_width: float = 0.92,
        ramp_gamma: float = 10.0,
        adversarial: bool = False,
    ) -> None:
        super().__init__()
        if estimator not in get_args(MMDEstimator):
            raise ConfigurationError(
                f"Expected `--model.estimator` to be one of {', '.join(get_args(MMDEstimator))}, but got {estimator!r}."
            )
        if not kernel_scales or min(kernel_scales) <= 0:
            raise ConfigurationError(
                f"Expected `--model.kernel_scales` to be numbers above 0, but got {list(kernel_scales)}."
            )
        if not probability_width > 0:
            raise ConfigurationError(
                f"Expected `--model.probability_width` to be above 0, but got {probability_width}."
            )
        at_least_zero("--model.ramp_gamma", ramp_gamma)
        self.estimator, self.kernel_scales, self.ramp_gamma = estimator, tuple(kernel_scales), ramp_gamma
        self.probability_bandwidth = probability_width**2
        self.maps = nn.ParameterList(torch.eye(width) for width in (num_features, num_classes) if adversarial)

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The weighted estimate, a scalar."""
        ramp = reversal_coefficient(progress, self.ramp_gamma) if self.ramp_gamma > 0 else torch.ones_like(progress)
        mmd = joint_mmd(
            self._layers(source),
            self._layers(target),
            self.estimator,
            scales=(self.kernel_scales, (1.0,)),
            bandwidths=(None, self.probability_bandwidth),
        )
        self.diagnostics = {"joint_mmd": mmd.detach(), "ramp": ramp}
        if self.maps:
            maps = [matrix.detach() for matrix in self.maps]
            moved = [(m - torch.eye(len(m), dtype=m.dtype, device=m.device)).square().sum() / len(m) for m in maps]
            self.diagnostics["adversary"] = torch.stack(moved).mean().sqrt()
        return ramp * mmd

    def _layers(self, outputs: NetworkOutputs) -> list[Tensor]:
        layers = [outputs.features, _probabilities(outputs.logits)]
        if not self.maps:
            return layers
        # the maps' own gradient is reversed, what passes through them to the network is not
        one = torch.ones((), device=outputs.features.device)
        return [full_precision_matmul(x, reverse_gradient(m, one).T) for x, m in zip(layers, self.maps, strict=True)]


@full_precision
def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


class JAN(DomainAdaptation):
    """Joint adaptation network (Long et al., ICML 2017), on the bottleneck's features and the predictions.

    Args:
        num_classes: number of classes ``K``.
        estimator: of the squared discrepancy, ``biased``, ``unbiased`` or ``linear_time`` (the paper's).
        kernel_scales: widths of the features' Gaussian kernels as multiples of the mean squared distance in the batch.
        probability_width: standard deviation of the probabilities' Gaussian kernel.
        ramp_gamma: steepness of the schedule of the loss's weight, 0 for a constant weight.
        adversarial: JAN-A, the discrepancy after linear maps that are trained to raise it.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        estimator: MMDEstimator = "unbiased",
        kernel_scales: tuple[float, ...] = FIVE_SCALES,
        probability_width: float = 0.92,
        ramp_gamma: float = 10.0,
        adversarial: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.alignment = JointMaximumMeanDiscrepancyLoss(
            self.num_features,
            num_classes,
            estimator=estimator,
            kernel_scales=kernel_scales,
            probability_width=probability_width,
            ramp_gamma=ramp_gamma,
            adversarial=adversarial,
        )
        self.estimator = estimator

    def prepare_data(self) -> None:
        """Refuse batches that the estimator cannot take."""
        super().prepare_data()
        linear_time = "--model.estimator linear_time" if self.estimator == "linear_time" else ""
        check_batch_sizes(self, at_least=2, why="between which JAN measures distances", equal_for=linear_time)
