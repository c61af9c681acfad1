"""Three estimators of the squared maximum mean discrepancy with a sum of Gaussian kernels, and of the joint one.

With ``k`` the kernel, ``s, s'`` independent source samples and ``t, t'`` target samples (Gretton et al. 2012, lemma 6)
it is ``E k(s, s') + E k(t, t') - 2 E k(s, t)``.

All three take ``scales`` of the kernels and a ``bandwidth``: kernel u is ``exp(-d^2 / (2 * scales[u] * bandwidth))``.
By default the bandwidth is the mean squared distance over all pairs of the joint sample, without a gradient. It is
symmetric in the samples, so the estimators that are unbiased for a fixed bandwidth keep a mean of 0 where the two
distributions are equal. Equal features give 0, with a gradient of 0.

The biased and the unbiased estimator go by symmetric blocks of the pairs (:mod:`framework.functional.blockwise_mmd`):
value and gradient in one pass, in bounded memory. Only the first derivative exists. A graph of ``torch.compile`` breaks
there, so up to ``LARGEST_IN_GRAPH`` samples of both domains together it gets all pairs at once.

The joint discrepancy of several layers (Long et al. 2017) has the product of the layers' kernels in place of ``k``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.blockwise_mmd import Pairs, blockwise_discrepancy
from framework.functional.kernels import (
    FIVE_SCALES,
    check_features,
    gaussian_kernel_sum,
    mean_squared_distance,
    squared_distances,
)
from framework.functional.precision import full_precision

MMDEstimator = Literal["biased", "unbiased", "linear_time"]
# samples of both domains together up to which `torch.compile` gets all pairs at once, which make one graph; uncompiled,
# the blocks are faster from the smallest batch on
LARGEST_IN_GRAPH = 256


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
    return _biased([_checked(source, target, scales, bandwidth)])


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
    return _unbiased([_checked(source, target, scales, bandwidth, least=2)])


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
    return _linear_time([_checked(source, target, scales, bandwidth, least=2)])


@full_precision
def joint_mmd(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    estimator: MMDEstimator = "unbiased",
    scales: Sequence[Sequence[float]] = (FIVE_SCALES, (1.0,)),
    bandwidths: Sequence[Tensor | float | None] = (None, 0.92**2),
) -> Tensor:
    """The joint maximum mean discrepancy of several layers' outputs (Long et al. 2017, sec. 3).

    The kernel of two images is the product over the layers of each layer's sum of Gaussian kernels: the mean embedding
    of the layers' joint distribution. The defaults are those of the published codes for features and the
    probabilities of the classes: five kernels, times ``exp(-d^2 / (2 * 0.92^2))``.

    Args:
        source: each layer's output, shapes ``[N, D_1]``, ``[N, D_2]``, ...
        target: the same of the target, shapes ``[M, D_1]``, ``[M, D_2]``, ...
        estimator: that of ``biased_mmd``, ``unbiased_mmd`` or ``linear_time_mmd``; the last one needs ``N = M``.
        scales: each layer's factors of its bandwidth.
        bandwidths: each layer's bandwidth, in the unit of a squared distance; None for the joint sample's mean squared
            distance, detached.

    Returns:
        0-d tensor.

    Raises:
        ConfigurationError: shapes or numbers of layers that do not fit, an unknown estimator, or scales or bandwidths
            that are not positive.

    >>> one, two = torch.tensor([[0.0]]), torch.tensor([[2.0]])
    >>> joint_mmd([one, one], [two, two], "biased", scales=[(1.0,), (1.0,)], bandwidths=[4.0, 4.0])  # 2 - 2 exp(-1/2)^2
    tensor(1.2642)
    """
    if estimator not in ESTIMATORS:
        raise ConfigurationError(f"Expected `estimator` to be one of {', '.join(ESTIMATORS)}, but got {estimator!r}.")
    counts = (len(source), len(target), len(scales), len(bandwidths))
    if len(source) == 0 or len(set(counts)) > 1:
        raise ConfigurationError(
            "Expected `source`, `target`, `scales` and `bandwidths` to have one entry for each layer, but got "
            f"{', '.join(map(str, counts))} entries."
        )
    least = 1 if estimator == "biased" else 2
    layers = [_checked(*layer, least=least) for layer in zip(source, target, scales, bandwidths, strict=True)]
    for name, samples in (("source", source), ("target", target)):
        if len({len(layer) for layer in samples}) > 1:
            raise ConfigurationError(
                f"Expected all layers of `{name}` to have the same number of samples, but got "
                f"{[len(layer) for layer in samples]}."
            )
    return ESTIMATORS[estimator](layers)


class _Layer(NamedTuple):
    source: Tensor
    target: Tensor
    scales: Sequence[float]
    bandwidth: Tensor


def _checked(
    source: Tensor, target: Tensor, scales: Sequence[float], bandwidth: Tensor | float | None, least: int = 1
) -> _Layer:
    check_features(source, target, least)
    return _Layer(source, target, scales, _bandwidth(source, target, bandwidth))


def _biased(layers: Sequence[_Layer]) -> Tensor:
    n, m = len(layers[0].source), len(layers[0].target)
    if _by_blocks(layers):
        # the pairs of a sample with itself, which the blocks leave out, have a kernel of 1 in each scale
        themselves = math.prod(len(layer.scales) for layer in layers) * (1.0 / n + 1.0 / m)
        return _blockwise(layers, Pairs(1.0 / n**2, 1.0 / m**2, -1.0 / (n * m))) + themselves
    within_source, within_target, between = _kernels(layers)
    return within_source.mean() + within_target.mean() - 2.0 * between.mean()


def _unbiased(layers: Sequence[_Layer]) -> Tensor:
    n, m = len(layers[0].source), len(layers[0].target)
    if _by_blocks(layers):
        return _blockwise(layers, Pairs(1.0 / (n * (n - 1)), 1.0 / (m * (m - 1)), -1.0 / (n * m)))
    within_source, within_target, between = _kernels(layers)
    return _mean_of_distinct(within_source) + _mean_of_distinct(within_target) - 2.0 * between.mean()


def _by_blocks(layers: Sequence[_Layer]) -> bool:
    if any(layer.bandwidth.requires_grad for layer in layers):  # for a bandwidth that learns the blocks have none
        return False
    samples = len(layers[0].source) + len(layers[0].target)
    return not torch.compiler.is_compiling() or samples > LARGEST_IN_GRAPH


def _blockwise(layers: Sequence[_Layer], weights: Pairs) -> Tensor:
    features = [(layer.source, layer.target) for layer in layers]
    value: Tensor = blockwise_discrepancy(
        features, [layer.scales for layer in layers], [layer.bandwidth for layer in layers], weights
    )
    return value


def _linear_time(layers: Sequence[_Layer]) -> Tensor:
    kernels = []
    for source, target, scales, bandwidth in layers:
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
        kernels.append(gaussian_kernel_sum((first - second).square().sum(-1), scales, bandwidth))
    within_source, within_target, between_1, between_2 = math.prod(kernels[1:], start=kernels[0]).mean(1).unbind()
    return within_source + within_target - between_1 - between_2


ESTIMATORS = {"biased": _biased, "unbiased": _unbiased, "linear_time": _linear_time}


def _kernels(layers: Sequence[_Layer]) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel within the source ``[N, N]``, within the target ``[M, M]`` and between the two ``[N, M]``."""
    # three blocks and not one matrix of the joint sample: three quarters of the work, and no slices to scatter back
    blocks = [
        tuple(
            gaussian_kernel_sum(squared_distances(x, y), scales, bandwidth)
            for x, y in ((source, source), (target, target), (source, target))
        )
        for source, target, scales, bandwidth in layers
    ]
    within_source, within_target, between = (
        math.prod(kernels[1:], start=kernels[0]) for kernels in zip(*blocks, strict=True)
    )
    return within_source, within_target, between


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
