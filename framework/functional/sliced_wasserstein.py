"""The Wasserstein distance of two samples, averaged over the lines that both are projected on."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.kernels import check_features
from framework.functional.precision import HALF_PRECISION, full_precision, full_precision_matmul


@full_precision
def sliced_wasserstein(source: Tensor, target: Tensor, directions: Tensor, order: int = 2) -> Tensor:
    """The mean over the directions of ``W_p^p`` of the projected samples (Bonneel et al. 2015, eq. 9).

    On a line the best transport keeps the order, so it is the mean of ``|a - b| ** p`` over the sorted projections; of
    samples that differ in number, the integral over their quantile functions, which is as exact. There is no root:
    its gradient is infinite where the samples are equal.

    Args:
        source: shape ``[N, D]``.
        target: shape ``[M, D]``.
        directions: unit vectors, shape ``[P, D]``; see :func:`random_directions`.
        order: p, 1 or 2.

    Returns:
        0-d tensor, 0 or more.

    Raises:
        ConfigurationError: shapes that do not fit, or another order.

    >>> source, target = torch.tensor([[0.0, 5.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [2.0, 5.0]])
    >>> sliced_wasserstein(source, target, torch.eye(2), order=2)  # (0, 1) to (2, 3), and (0, 5) to (0, 5)
    tensor(2.)
    """
    check_features(source, target)
    if directions.ndim != 2 or directions.shape[1] != source.shape[1]:
        raise ConfigurationError(
            f"Expected `directions` to have shape [directions, {source.shape[1]}], but got {list(directions.shape)}."
        )
    if order not in (1, 2):
        raise ConfigurationError(f"Expected `order` to be 1 or 2, but got {order!r}.")
    projections = directions.to(source.dtype).T
    source = full_precision_matmul(source, projections).sort(dim=0).values  # [N, P]
    target = full_precision_matmul(target, projections).sort(dim=0).values  # [M, P]
    if len(source) == len(target):
        return _power(source - target, order).mean()
    # Both quantile functions are steps, of width 1 / N and 1 / M. In units of 1 / (N M) all steps start at whole
    # numbers; where two start together, one of them gets width 0.
    units = len(source) * len(target)
    starts = torch.cat(
        [
            torch.arange(0, units, len(target), device=source.device),
            torch.arange(0, units, len(source), device=source.device),
        ]
    )
    starts = starts.sort().values
    widths = torch.diff(starts, append=starts.new_full((1,), units)).to(source.dtype) / units
    difference = source[starts // len(target)] - target[starts // len(source)]
    return (widths[:, None] * _power(difference, order)).sum(dim=0).mean()


def random_directions(count: int, like: Tensor) -> Tensor:
    """Directions drawn evenly from the unit sphere of the samples' space.

    Args:
        count: how many, ``P``.
        like: samples ``[N, D]``, whose width, device and floating type (float32 for half precision) they get.

    Returns:
        Shape ``[P, D]``, rows of length 1.

    >>> random_directions(4, torch.zeros(8, 3)).norm(dim=1).round(decimals=4)
    tensor([1., 1., 1., 1.])
    """
    dtype = torch.float32 if like.dtype in HALF_PRECISION else like.dtype
    directions = torch.randn(count, like.shape[1], device=like.device, dtype=dtype)
    return torch.nn.functional.normalize(directions, dim=1)


def _power(difference: Tensor, order: int) -> Tensor:
    return difference.abs() if order == 1 else difference.square()
