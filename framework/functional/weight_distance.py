"""Squared distances of many weight tensors at once: of a network from where it started, or from zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from framework.functional.precision import HALF_PRECISION


def half_squared_distance(weights: Sequence[Tensor], anchors: Sequence[Tensor] = ()) -> Tensor:
    """``1/2 * sum of |w - w0|^2`` over all tensors, with gradient ``w - w0``.

    All tensors are taken together, in a handful of kernels on an accelerator, and only the weights and anchors
    themselves are kept for the backward pass. The sum is in float32 for half-precision weights.

    Args:
        weights: tensors of any shapes on one device, at least one.
        anchors: what each is compared with, in the same shapes, without gradients; none for zeros.

    Returns:
        0-d tensor.

    >>> half_squared_distance([torch.tensor([3.0, 0.0]), torch.tensor([[5.0]])], [torch.zeros(2), torch.ones(1, 1)])
    tensor(12.5000)
    """
    distance: Tensor = _HalfSquaredDistance.apply(len(weights), *weights, *anchors)
    return distance


class _HalfSquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*tensors)
        dtype = torch.float32 if tensors[0].dtype in HALF_PRECISION else None
        norms = torch._foreach_norm(_differences(count, tensors), 2, dtype=dtype)
        return torch.stack(list(norms)).square().sum() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # the differences again, which is cheaper than to keep a copy of the network until here
        differences = _differences(ctx.count, ctx.saved_tensors)
        scaled = torch._foreach_mul(differences, gradient.to(differences[0].dtype))
        needed = ctx.needs_input_grad[1 : 1 + ctx.count]  # frozen weights take none
        gradients = [value if need else None for value, need in zip(scaled, needed, strict=True)]
        return None, *gradients, *[None] * (len(ctx.saved_tensors) - ctx.count)


def _differences(count: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights, anchors = tensors[:count], tensors[count:]
    return tuple(torch._foreach_sub(weights, anchors)) if anchors else weights
