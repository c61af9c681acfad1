"""The distance between two sets of weights against a loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from framework.functional import half_squared_distance


def tensors(seed: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2, 2), (5,), (), (2, 7)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes]


@pytest.mark.parametrize("anchored", [True, False])
def test_value_and_gradient(anchored: bool) -> None:
    weights, anchors = tensors(0, grad=True), tensors(1) if anchored else []
    zeros = [torch.zeros_like(w) for w in weights]
    pairs = list(zip(weights, anchors or zeros, strict=True))
    expected = sum(
        (float(a) - float(b)) ** 2 for w, w0 in pairs for a, b in zip(w.detach().flatten(), w0.flatten(), strict=True)
    )
    value = half_squared_distance(weights, anchors)
    assert float(value) == pytest.approx(expected / 2, rel=1e-12)
    for gradient, (w, w0) in zip(torch.autograd.grad(3 * value, weights), pairs, strict=True):
        torch.testing.assert_close(gradient, 3 * (w - w0).detach())
    assert torch.autograd.gradcheck(lambda *w: half_squared_distance(w, anchors), weights)


def test_at_the_anchors_there_is_no_pull() -> None:
    weights = tensors(0, grad=True)
    value = half_squared_distance(weights, [w.detach().clone() for w in weights])
    assert float(value) == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, weights))


def test_frozen_weights_take_no_gradient() -> None:
    weights = tensors(0, grad=True)
    weights[1].requires_grad_(False)
    half_squared_distance(weights, tensors(1)).backward()
    assert weights[1].grad is None
    assert all(w.grad is not None for w in (weights[0], weights[2], weights[3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    weights = [torch.full((300, 300), 2.0, dtype=dtype).requires_grad_()]  # 180,000 is beyond float16
    with torch.autocast("cpu", torch.bfloat16):
        value = half_squared_distance(weights, [torch.zeros(300, 300, dtype=dtype)])
    assert value.dtype == torch.float32
    assert float(value) == 180_000
    assert torch.equal(torch.autograd.grad(value, weights)[0], weights[0].detach())
