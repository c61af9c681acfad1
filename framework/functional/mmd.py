"""Three estimators of the squared maximum mean discrepancy with a sum of Gaussian kernels.

With ``k`` the kernel, ``s, s'`` independent source samples and ``t, t'`` target samples (Gretton et al. 2012, lemma 6)
it is ``E k(s, s') + E k(t, t') - 2 E k(s, t)``.

All three take ``scales`` of the kernels and a ``bandwidth``: kernel u is ``exp(-d^2 / (2 * scales[u] * bandwidth))``.
By default the bandwidth is the mean squared distance over all pairs of the joint sample, without a gradient. It is
symmetric in the samples, so the estimators that are unbiased for a fixed bandwidth keep a mean of 0 where the two
distributions are equal. Equal features give 0, with a gradient of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.kernels import (
    FIVE_SCALES,
    check_features,
    gaussian_kernel_sum,
    mean_squared_distance,
    squared_distances,
)
from framework.functional.precision import full_precision


@full_precision
def biased_mmd(
    source: Tensor,
    target: Tensor,
    scales: Sequence[float] = FIVE_SCALES,
    bandwidth: Tensor | float | None = None,
) -> Tensor:
    """The V-statistic (Gretton et al. 2012, eq. 5): the distance of the two samples' mean embeddings, never negative.

    Each sample is compared with itself too, so equal distributions have a positive mean of order ``1/N + 1/M``.

    Args:
        source: shape ``[N, D]``.
        target: shape ``[M, D]``; ``M`` may differ from ``N``.
        scales: factors of the bandwidth, one kernel each.
        bandwidth: in the unit of a squared distance; default: the joint sample's mean squared distance, detached.

    Returns:
        0-d tensor, at least 0 but for rounding.

    Raises:
        ConfigurationError: shapes that do not fit, or scales or a bandwidth that are not positive.

    >>> biased_mmd(torch.tensor([[0.0]]), torch.tensor([[2.0]]), scales=(1.0,), bandwidth=2.0)  # 2 - 2 exp(-1)
    tensor(1.2642)
    """
    check_features(source, target)
    within_source, within_target, between = _kernels(source, target, scales, bandwidth)
    return within_source.mean() + within_target.mean() - 2.0 * between.mean()


@full_precision
def unbiased_mmd(
    source: Tensor,
    target: Tensor,
    scales: Sequence[float] = FIVE_SCALES,
    bandwidth: Tensor | float | None = None,
) -> Tensor:
    """The U-statistic (Gretton et al. 2012, eq. 3): no sample is compared with itself; may be negative.

    The published codes of DAN and JAN add ``2 / (n - 1)`` to it. That is left out here: it has no gradient and shifts
    the mean of equal distributions away from 0.

    Args:
        source: shape ``[N, D]``, at least two samples.
        target: shape ``[M, D]``, at least two samples; ``M`` may differ from ``N``.
        scales: factors of the bandwidth, one kernel each.
        bandwidth: in the unit of a squared distance; default: the joint sample's mean squared distance, detached.

    Returns:
        0-d tensor.

    Raises:
        ConfigurationError: shapes that do not fit, or scales or a bandwidth that are not positive.

    >>> samples = torch.tensor([[0.0], [2.0]])
    >>> unbiased_mmd(samples, samples, scales=(1.0,), bandwidth=2.0)  # 2 exp(-1) - (1 + exp(-1))
    tensor(-0.6321)
    """
    check_features(source, target, least=2)
    within_source, within_target, between = _kernels(source, target, scales, bandwidth)
    return _mean_of_distinct(within_source) + _mean_of_distinct(within_target) - 2.0 * between.mean()


@full_precision
def linear_time_mmd(
    source: Tensor,
    target: Tensor,
    scales: Sequence[float] = FIVE_SCALES,
    bandwidth: Tensor | float | None = None,
) -> Tensor:
    """The mean over disjoint pairs of samples (Gretton et al. 2012, lemma 14; Long et al. 2015, sec. 3.2).

    Of each two neighbours ``s1, s2`` in the source and ``t1, t2`` in the target it takes
    ``k(s1, s2) + k(t1, t2) - k(s1, t2) - k(s2, t1)``. Unbiased, may be negative; time and memory are linear in ``N``,
    the default bandwidth's too, and the variance is far above the other two estimators'. The published codes of DAN
    pair in a ring and add ``2 / (n - 1)``, which shifts the mean of equal distributions away from 0: not so here.

    Args:
        source: shape ``[N, D]``, at least two samples in random order; the last one of an odd number has no partner.
        target: shape ``[N, D]``, as many as in the source.
        scales: factors of the bandwidth, one kernel each.
        bandwidth: in the unit of a squared distance; default: the joint sample's mean squared distance, detached,
            over all pairs as in the other two estimators, by way of the variance.

    Returns:
        0-d tensor.

    Raises:
        ConfigurationError: shapes that do not fit, or scales or a bandwidth that are not positive.

    >>> source, target = torch.tensor([[0.0], [0.0]]), torch.tensor([[2.0], [2.0]])
    >>> linear_time_mmd(source, target, scales=(1.0,), bandwidth=2.0)  # 1 + 1 - 2 exp(-1)
    tensor(1.2642)
    """
    check_features(source, target, least=2)
    if len(source) != len(target):
        raise ConfigurationError(
            "Expected `source` and `target` to have the same number of samples for the linear-time estimator,"
            f" but got {len(source)} and {len(target)}."
        )
    pairs = len(source) // 2
    source_1, source_2 = source[0 : 2 * pairs : 2], source[1 : 2 * pairs : 2]
    target_1, target_2 = target[0 : 2 * pairs : 2], target[1 : 2 * pairs : 2]
    first = torch.stack([source_1, target_1, source_1, source_2])
    second = torch.stack([source_2, target_2, target_2, target_1])
    distances = (first - second).square().sum(-1)
    kernels = gaussian_kernel_sum(distances, scales, _bandwidth(source, target, bandwidth))
    within_source, within_target, between_1, between_2 = kernels.mean(1).unbind()
    return within_source + within_target - between_1 - between_2


def _kernels(
    source: Tensor, target: Tensor, scales: Sequence[float], bandwidth: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel within the source ``[N, N]``, within the target ``[M, M]`` and between the two ``[N, M]``."""
    # three blocks and not one matrix of the joint sample: three quarters of the work, and no slices to scatter back
    common = _bandwidth(source, target, bandwidth)
    return (
        gaussian_kernel_sum(squared_distances(source, source), scales, common),
        gaussian_kernel_sum(squared_distances(target, target), scales, common),
        gaussian_kernel_sum(squared_distances(source, target), scales, common),
    )


def _bandwidth(source: Tensor, target: Tensor, bandwidth: Tensor | float | None) -> Tensor:
    if bandwidth is None:
        return mean_squared_distance(source, target)
    if isinstance(bandwidth, Tensor):
        return bandwidth  # not looked at: reading it would wait for the device
    if not (bandwidth > 0.0 and math.isfinite(bandwidth)):
        raise ConfigurationError(f"Expected `bandwidth` to be positive, but got {bandwidth}.")
    return torch.full((), bandwidth, dtype=source.dtype, device=source.device)


def _mean_of_distinct(kernel: Tensor) -> Tensor:
    """The mean over all pairs of a square matrix but each sample's with itself."""
    samples = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (samples * (samples - 1))
