"""Squared distances and the sum of Gaussian kernels that the maximum mean discrepancy is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.precision import full_precision, full_precision_matmul

# 2^-3 .. 2^1 times the mean squared distance: the five kernels of the published codes of DAN and JAN
FIVE_SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)
MOST_SQUARINGS = 4


@full_precision
def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances of all rows, from one Gram matrix: ``|x|^2 + |y|^2 - 2 x.y``.

    Both are centred on their joint mean first. Distances do not change by that, but the terms of the sum do: in
    float32 a common offset of 300 leaves nothing of the uncentred result, while the centred one is right to 1e-6.

    Args:
        x: shape ``[N, D]``.
        y: shape ``[M, D]``, possibly ``x`` itself.

    Returns:
        Shape ``[N, M]``, never negative.

    Raises:
        ConfigurationError: not two matrices with rows of one length.

    >>> squared_distances(torch.tensor([[300.0, 0.0]]), torch.tensor([[303.0, 4.0], [300.0, 0.0]]))
    tensor([[25.,  0.]])
    """
    check_features(x, y, names=("x", "y"))
    centre = joint_mean(x, y)
    x, y = x - centre, y - centre
    squared = x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2.0 * full_precision_matmul(x, y.T)
    # rounding may leave near duplicates a little below 0: correct the value only, since a clamp would also cut off
    # the gradient that still draws such pairs together
    return squared - squared.detach().clamp(max=0.0)


@full_precision
def mean_squared_distance(source: Tensor, target: Tensor) -> Tensor:
    """The mean of the squared distances over all pairs of the joint sample, each row's pair with itself included.

    That is the bandwidth of the published codes of DAN and JAN, a mean over ``(2n)^2`` entries. It equals twice the
    total variance of the joint sample, so it costs no matrix of pairs. Without a gradient: else the kernels would
    shrink the loss by spreading the features.

    Args:
        source: shape ``[N, D]``.
        target: shape ``[M, D]``.

    Returns:
        0-d tensor, detached.

    >>> mean_squared_distance(torch.tensor([[0.0]]), torch.tensor([[2.0]]))  # of 0, 4, 4, 0
    tensor(2.)
    """
    source, target = source.detach(), target.detach()
    centre = joint_mean(source, target)
    # not by `var`, which takes several times as long over the first dimension
    squares = (source - centre).square().sum() + (target - centre).square().sum()
    return 2.0 * squares / (len(source) + len(target))


@full_precision
def gaussian_kernel_sum(squared_distances: Tensor, scales: Sequence[float], bandwidth: Tensor) -> Tensor:
    """``sum over u of exp(-d^2 / (2 * scales[u] * bandwidth))`` (Long et al. 2015, sec. 3.1, with equal weights).

    Where a scale is a power of two times the next narrower one, the narrower kernel is a repeated square of the wider
    one: one exponential serves the five usual ones.

    Args:
        squared_distances: ``d^2``, any shape.
        scales: positive factors of the bandwidth, in any order.
        bandwidth: 0-d tensor in the unit of ``d^2``, usually their mean. Where it is 0, so are all distances, and
            each kernel is 1.

    Returns:
        The shape of ``squared_distances``, values in ``[0, len(scales)]``.

    Raises:
        ConfigurationError: no scales, or one that is not positive.

    >>> gaussian_kernel_sum(torch.tensor([0.0, 4.0]), scales=(1.0, 2.0), bandwidth=torch.tensor(2.0))
    tensor([2.0000, 0.9744])
    """
    steps = kernel_steps(scales)
    # equal features have no distance to scale by; 0 / floor is 0, and the gradient stays finite
    exponent = -squared_distances / (2.0 * bandwidth.clamp(min=1e-30))
    kernel = total = torch.exp(exponent / steps[0][0])
    for scale, squarings in steps[1:]:
        if squarings is None:
            kernel = torch.exp(exponent / scale)
        for _ in range(squarings or 0):
            kernel = kernel.square()
        total = total + kernel
    return total


def kernel_steps(scales: Sequence[float]) -> list[tuple[float, int | None]]:
    """The scales, widest first, each with the squarings that make its kernel of the one before, or None for an ``exp``.

    Each squaring doubles the relative error, so there are at most four from one exponential on.

    Raises:
        ConfigurationError: no scales, or one that is not positive.

    >>> kernel_steps((0.5, 2.0, 1.5, 6.0))
    [(6.0, None), (2.0, None), (1.5, None), (0.5, None)]
    >>> kernel_steps((0.5, 2.0, 2.0))
    [(2.0, None), (2.0, 0), (0.5, 2)]
    """
    if not scales or not all(scale > 0.0 and math.isfinite(scale) for scale in scales):
        raise ConfigurationError(f"Expected `scales` to be positive numbers, but got {list(scales)}.")
    widest_first = sorted(scales, reverse=True)
    steps: list[tuple[float, int | None]] = [(widest_first[0], None)]
    left = MOST_SQUARINGS
    for wider, narrower in pairwise(widest_first):
        fitting = [count for count in range(left + 1) if wider == 2.0**count * narrower]
        left = left - fitting[0] if fitting else MOST_SQUARINGS
        steps.append((narrower, fitting[0] if fitting else None))
    return steps


def check_features(
    source: Tensor, target: Tensor, least: int = 1, names: tuple[str, str] = ("source", "target")
) -> None:
    """Raise a ConfigurationError unless both are matrices with rows of one length and at least ``least`` rows."""
    for name, features in zip(names, (source, target), strict=True):
        if features.ndim != 2 or len(features) < least:
            raise ConfigurationError(
                f"Expected `{name}` to have shape [samples, features] with at least {least} samples,"
                f" but got {list(features.shape)}."
            )
    if source.shape[1] != target.shape[1]:
        raise ConfigurationError(
            f"Expected `{names[0]}` and `{names[1]}` to have the same number of features,"
            f" but got {source.shape[1]} and {target.shape[1]}."
        )


def joint_mean(x: Tensor, y: Tensor) -> Tensor:
    """The mean of all rows, detached, since distances do not depend on it.

    Taken relative to the first row: exact where all rows are equal, so that their distances are 0 and not rounding.
    """
    x, y = x.detach(), y.detach()
    first = x[0]
    return first + ((x - first).sum(0) + (y - first).sum(0)) / (len(x) + len(y))
