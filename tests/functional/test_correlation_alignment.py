"""CORAL against a loop, in both of its forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from framework.errors import ConfigurationError
from framework.functional import coral

WIDE, NARROW = (5, 7, 40), (30, 20, 6)  # samples of the two domains and width: Gram matrices, covariances


def samples(count: int, width: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, width, generator=generator, dtype=torch.float64) + 0.3


def pair(sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return samples(sizes[0], sizes[2]), samples(sizes[1], sizes[2], seed=1, scale=1.5) + 1


def loop_covariance(rows: list[list[float]]) -> list[list[float]]:
    """Eq. 2 of the paper: (D^T D - (1^T D)^T (1^T D) / n) / (n - 1)."""
    n, width = len(rows), len(rows[0])
    total = [sum(row[j] for row in rows) for j in range(width)]
    return [
        [(sum(row[j] * row[k] for row in rows) - total[j] * total[k] / n) / (n - 1) for k in range(width)]
        for j in range(width)
    ]


def loop_coral(source: Tensor, target: Tensor) -> float:
    c_s, c_t = loop_covariance(source.tolist()), loop_covariance(target.tolist())
    width = len(c_s)
    return sum((c_s[j][k] - c_t[j][k]) ** 2 for j in range(width) for k in range(width)) / (4 * width**2)


@pytest.mark.parametrize("sizes", [WIDE, NARROW, (2, 2, 3), (4, 4, 6), (3, 9, 1)])
def test_against_a_loop(sizes: tuple[int, int, int]) -> None:
    source, target = pair(sizes)
    assert coral(source, target).item() == pytest.approx(loop_coral(source, target), rel=1e-12)


def test_the_two_forms_are_equal() -> None:
    source, target = (x.requires_grad_() for x in pair(WIDE))
    wide = coral(source, target)
    direct = (source.T.cov() - target.T.cov()).square().sum() / (4 * 40**2)
    assert wide.item() == pytest.approx(direct.item(), rel=1e-12)
    for found, expected in zip(
        torch.autograd.grad(wide, [source, target]), torch.autograd.grad(direct, [source, target]), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        (WIDE, [(5, 5), (7, 7), (5, 7)], [(5, 40), (7, 40), (5, 40), (40, 7)]),
        (NARROW, [(6, 6), (6, 6)], [(6, 30), (6, 20)]),
    ],
)
def test_the_products_are_the_fewer_ones(sizes: tuple[int, int, int], forward: Any, backward: Any) -> None:
    """Few wide samples make no covariance, and what is symmetric has one product in its gradient."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if "aten.mm" in str(function):
                shapes.append(tuple(result.shape))
            return result

    shapes: list[tuple[int, ...]] = []
    with Watch():
        loss = coral(*(x.requires_grad_() for x in pair(sizes)))
    assert shapes == forward
    shapes = []
    with Watch():
        loss.backward()
    assert sorted(shapes) == sorted(backward)


@pytest.mark.parametrize("sizes", [(32, 24, 300), (12, 12, 21), (12, 12, 20), (90, 150, 40)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_either_form_against_the_other_in_float64(
    sizes: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    inputs = [x.to(dtype).requires_grad_() for x in pair(sizes)]
    loss = coral(*inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    n, m, width = sizes
    x, y = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in exact)
    if 2 * n * n + 2 * m * m + 3 * n * m < 2 * (n + m) * width:  # the samples' matrices are taken, here the covariances
        squared = (x.T @ x - y.T @ y).square().sum()
    else:
        squared = (x @ x.T).square().sum() + (y @ y.T).square().sum() - 2 * (x @ y.T).square().sum()
    expected = squared / (4 * width**2)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for found, gradient in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact), strict=True):
        assert (found.double() - gradient).abs().max() <= tolerance * gradient.abs().max()


def test_tllibs_form_is_four_times_ours_with_a_mean_term() -> None:
    source, target = pair(NARROW)
    covariances = (source.T.cov() - target.T.cov()).square().mean()
    means = (source.mean(0) - target.mean(0)).square().mean()
    assert 4 * coral(source, target, mean_weight=0.25).item() == pytest.approx((covariances + means).item())
    assert coral(source, target + 5).item() == pytest.approx(coral(source, target).item())  # the paper's is blind to it
    assert coral(source, target + 5, mean_weight=1.0) > 10


@pytest.mark.parametrize("sizes", [(3, 4, 30), (6, 5, 3)])
@pytest.mark.parametrize("mean_weight", [0.0, 0.5])
def test_gradients(sizes: tuple[int, int, int], mean_weight: float) -> None:
    source, target = (x.requires_grad_() for x in pair(sizes))
    assert torch.autograd.gradcheck(lambda s, t: coral(s, t, mean_weight), (source, target))


@pytest.mark.parametrize("sizes", [WIDE, NARROW])
def test_order_of_samples_and_domains_and_scale(sizes: tuple[int, int, int]) -> None:
    source, target = pair(sizes)
    expected = coral(source, target)
    torch.testing.assert_close(coral(source.flip(0), target.flip(0)), expected)
    torch.testing.assert_close(coral(target, source), expected)
    torch.testing.assert_close(coral(3 * source, 3 * target), 81 * expected)


@pytest.mark.parametrize("sizes", [(8, 8, 500), (64, 64, 8)])
def test_equal_samples_have_no_loss_and_no_gradient(sizes: tuple[int, int, int]) -> None:
    for seed in range(5):
        source = samples(sizes[0], sizes[2], seed=seed, scale=30.0).float().requires_grad_()
        target = source.detach().flip(0).clone()
        loss = coral(source, target)
        (gradient,) = torch.autograd.grad(loss, source)
        size = source.detach().T.cov().square().sum() / (4 * sizes[2] ** 2)
        assert 0 <= loss < 1e-5 * size
        assert gradient.norm() < 1e-5 * torch.autograd.grad(coral(source, 2 * target), source)[0].norm()


@pytest.mark.parametrize("sizes", [(32, 32, 256), (64, 64, 10)])
def test_float32_with_a_common_offset_and_autocast(sizes: tuple[int, int, int]) -> None:
    source, target = (x.float() + 100 for x in pair(sizes))
    expected = coral(source.double(), target.double()).item()
    assert coral(source, target).item() == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert coral(source, target).item() == pytest.approx(expected, rel=1e-4)


def test_errors() -> None:
    with pytest.raises(ConfigurationError, match=r"at least 2 samples, but got \[1, 3\]"):
        coral(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ConfigurationError, match="same number of features"):
        coral(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ConfigurationError, match="`mean_weight` to be 0 or more"):
        coral(torch.zeros(4, 3), torch.zeros(4, 3), mean_weight=-1.0)
