"""Local maximum mean discrepancy: the features of each class are aligned, not those of the domains as a whole.

Zhu et al., "Deep Subdomain Adaptation Network for Image Classification", TNNLS 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from framework.errors import ConfigurationError, at_least_zero
from framework.functional import FIVE_SCALES, CountedClasses, full_precision, local_mmd, reversal_coefficient
from framework.functional.subdomain_mmd import one_hot
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs


class LocalMaximumMeanDiscrepancyLoss(AlignmentLoss):
    """Squared maximum mean discrepancy of the features of each class, averaged over the classes (Zhu 2020).

    Source images belong to a class by their labels, target images by their predicted probabilities, which get no
    gradient from it.

    Diagnostics: ``local_mmd``, the estimate; ``shared_classes``, the share of the classes of the batch's source images
    that some target image is predicted to have; ``ramp``, the loss's weight by the schedule.

    Args:
        classes: ``all`` (the paper: the sum of the terms over ``K``) or ``shared`` (the authors' code and DeepDA: the
            mean over the classes of the source images that some target image is predicted to have).
        kernel_scales: widths of the kernels as multiples of the mean squared distance in the batch.
        ramp_gamma: the loss is weighted by ``2 / (1 + exp(-gamma * progress)) - 1``; 0 weighs it 1 throughout.
    """

    term = "dsan"

    def __init__(
        self, classes: CountedClasses = "all", kernel_scales: Sequence[float] = FIVE_SCALES, ramp_gamma: float = 10.0
    ) -> None:
        super().__init__()
        if classes not in get_args(CountedClasses):
            raise ConfigurationError(f"Expected `--model.classes` to be 'all' or 'shared', but got {classes!r}.")
        if not kernel_scales or min(kernel_scales) <= 0:
            raise ConfigurationError(
                f"Expected `--model.kernel_scales` to be numbers above 0, but got {list(kernel_scales)}."
            )
        at_least_zero("--model.ramp_gamma", ramp_gamma)
        self.classes, self.kernel_scales, self.ramp_gamma = classes, tuple(kernel_scales), ramp_gamma

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The weighted estimate, a scalar."""
        if source.labels is None:
            raise ConfigurationError("Expected `source.labels`, by which DSAN weighs the source images, but got None.")
        probabilities = _probabilities(target.logits.detach())
        ramp = reversal_coefficient(progress, self.ramp_gamma) if self.ramp_gamma > 0 else torch.ones_like(progress)
        discrepancy = local_mmd(
            source.features, target.features, source.labels, probabilities, self.classes, self.kernel_scales
        )
        of_source, of_target = (
            one_hot(classes, probabilities).amax(0) for classes in (source.labels, probabilities.argmax(1))
        )
        self.diagnostics = {
            "local_mmd": discrepancy.detach(),
            "shared_classes": (of_source * of_target).sum() / of_source.sum(),
            "ramp": ramp,
        }
        return ramp * discrepancy

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """Classes that hardly meet."""
        shared = means.get("train/shared_classes", 1.0)
        if progress >= 0.2 and shared < 0.25:
            yield (
                "dsan",
                f"only {shared:.0%} of the classes of a batch's source images are predicted for any of its target "
                "images (`train/shared_classes`): hardly any class is aligned. Raise `--data.target_batch_size`, or "
                "lower `--model.trade_off` if the target's predictions collapse.",
            )


@full_precision
def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


class DSAN(DomainAdaptation):
    """Deep subdomain adaptation network (Zhu et al., TNNLS 2020), with the alignment on the bottleneck's features.

    Args:
        num_classes: number of classes ``K``.
        classes: whose discrepancies are averaged, ``all`` (the paper) or ``shared``, those that the batch's source
            images have and its target images are predicted to have (the authors' code).
        kernel_scales: widths of the Gaussian kernels as multiples of the mean squared distance in the batch.
        ramp_gamma: steepness of the schedule of the loss's weight, 0 for a constant weight.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        classes: CountedClasses = "all",
        kernel_scales: tuple[float, ...] = FIVE_SCALES,
        ramp_gamma: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.alignment = LocalMaximumMeanDiscrepancyLoss(classes, kernel_scales, ramp_gamma)
