"""The blocks of the quadratic-time discrepancies against all pairs at once in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from framework.functional import FIVE_SCALES, biased_mmd, blockwise_mmd, joint_mmd, unbiased_mmd
from framework.functional.blockwise_mmd import CPU_ROWS

ESTIMATORS = [biased_mmd, unbiased_mmd]
SIZES = [(3, 3), (31, 31), (700, 700), (1100, 1100), (3, 700), (1100, 31)]
SCALES = [FIVE_SCALES, (1.0,), (0.7, 1.3), (0.25, 1.0, 4.0, 4.0), tuple(2.0**u for u in range(-4, 4))]


def samples(count: int, features: int = 6, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def all_pairs(
    unbiased: bool,
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    scales: Sequence[Sequence[float]],
    bandwidths: Sequence[float | None],
) -> Tensor:
    """From differences and not from a Gram matrix, each kernel with an exponential of its own, by autograd."""
    n, m = len(source[0]), len(target[0])
    kernel = torch.ones(n + m, n + m, dtype=torch.float64)
    for s, t, of_layer, bandwidth in zip(source, target, scales, bandwidths, strict=True):
        joint = torch.cat([s, t])
        distances = sum((column[:, None] - column[None, :]).square() for column in joint.unbind(1))
        assert isinstance(distances, Tensor)
        width = distances.detach().mean() if bandwidth is None else bandwidth
        kernel = kernel * sum(torch.exp(-distances / (2 * scale * width)) for scale in of_layer)
    weights = torch.cat([torch.ones(n).double() / n, -torch.ones(m).double() / m])
    pairs = weights[:, None] * weights[None, :]
    if unbiased:
        pairs[:n, :n] *= n / (n - 1)
        pairs[n:, n:] *= m / (m - 1)
        pairs.fill_diagonal_(0.0)
    return (pairs * kernel).sum()


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[float, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.item(), list(torch.autograd.grad(value, leaves))


def assert_near(found: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]], tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


# ---------------------------------------------------------------- value and gradient
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float64, 0.0), (torch.float32, 0.0), (torch.float32, 300.0)])
@pytest.mark.parametrize("sizes", SIZES)
def test_against_all_pairs(
    estimator: Callable[..., Tensor], dtype: torch.dtype, offset: float, sizes: tuple[int, int]
) -> None:
    source, target = samples(sizes[0], shift=offset).to(dtype), samples(sizes[1], seed=1, shift=offset + 0.5).to(dtype)
    unbiased = estimator is unbiased_mmd
    expected = value_and_gradients(
        lambda s, t: all_pairs(unbiased, [s], [t], [FIVE_SCALES], [None]), source.double(), target.double()
    )
    assert_near(value_and_gradients(estimator, source, target), expected, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("sizes", [(31, 31), (700, 530)])
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float64, 0.0), (torch.float32, 300.0)])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_joint_against_all_pairs(estimator: Any, dtype: torch.dtype, offset: float, sizes: tuple[int, int]) -> None:
    features = [samples(sizes[0], shift=offset), samples(sizes[1], seed=1, shift=offset + 0.5)]
    classes = [(2 * samples(count, 4, seed=seed)).softmax(1) for seed, count in enumerate(sizes)]
    inputs = [x.to(dtype) for x in (features[0], classes[0], features[1], classes[1])]
    expected = value_and_gradients(
        lambda *x: all_pairs(estimator == "unbiased", x[:2], x[2:], (FIVE_SCALES, (1.0,)), (None, 0.92**2)),
        *[x.double() for x in inputs],
    )
    found = value_and_gradients(lambda *x: joint_mmd(x[:2], x[2:], estimator), *inputs)
    assert_near(found, expected, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("bandwidth", [None, 2.5, torch.tensor(2.5)])
@pytest.mark.parametrize("rows", [4, 30])
def test_scales_and_bandwidths(
    estimator: Callable[..., Tensor],
    scales: tuple[float, ...],
    bandwidth: Tensor | float | None,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blockwise_mmd, "CPU_ROWS", rows)
    source, target = samples(9), samples(6, seed=1, shift=0.5)
    number = None if bandwidth is None else 2.5
    expected = value_and_gradients(
        lambda s, t: all_pairs(estimator is unbiased_mmd, [s], [t], [scales], [number]), source, target
    )
    found = value_and_gradients(lambda s, t: estimator(s, t, scales, bandwidth), source, target)
    assert_near(found, expected, 1e-12)


@pytest.mark.parametrize("rows", [2, 3, 100])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("scales", [(FIVE_SCALES, (1.0,)), ((0.7, 1.3), FIVE_SCALES)])
def test_gradcheck(estimator: Any, rows: int, scales: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise_mmd, "CPU_ROWS", rows)
    inputs = [x.requires_grad_() for x in (samples(5, 3), samples(5, 2), samples(4, 3, 1, 0.5), samples(4, 2, 1))]
    assert torch.autograd.gradcheck(lambda *x: joint_mmd(x[:2], x[2:], estimator, scales, (3.0, 2.0)), inputs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows", [4, 30])
def test_gradient_of_one_domain_and_its_factor(estimator: Callable[..., Tensor], rows: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(blockwise_mmd, "CPU_ROWS", rows)
    both = [samples(9), samples(6, seed=1, shift=0.5)]
    expected = value_and_gradients(estimator, *both)
    for learns in (0, 1):
        inputs = [x.clone().requires_grad_(i == learns) for i, x in enumerate(both)]
        (3.0 * estimator(*inputs)).backward()
        assert torch.equal(inputs[learns].grad, 3.0 * expected[1][learns])
        assert inputs[1 - learns].grad is None
    assert not estimator(*both).requires_grad
    with torch.no_grad():
        assert estimator(*[x.requires_grad_() for x in both]).item() == expected[0]
    with torch.inference_mode():
        assert estimator(*both).item() == expected[0]


def test_only_the_first_derivative() -> None:
    source, target = samples(5).requires_grad_(), samples(5, seed=1, shift=0.5)
    with pytest.raises(RuntimeError, match="Expected one derivative of the discrepancy"):
        torch.autograd.grad(unbiased_mmd(source, target), source, create_graph=True)


def test_a_bandwidth_that_learns_has_its_gradient() -> None:
    source, target = samples(5), samples(6, seed=1, shift=0.5)
    bandwidth = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: unbiased_mmd(source, target, bandwidth=b), bandwidth)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [0.1, 300.3, -7e5]])
def test_equal_features_over_several_blocks(estimator: Callable[..., Tensor], row: list[float]) -> None:
    source = torch.tensor(row).repeat(CPU_ROWS + 100, 1).requires_grad_()
    target = torch.tensor(row).repeat(CPU_ROWS + 3, 1).requires_grad_()
    loss = estimator(source, target)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert source.grad is not None
    assert target.grad is not None
    assert source.grad.abs().max() == target.grad.abs().max() == 0


# ---------------------------------------------------------------- where it runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_precision(dtype: torch.dtype) -> None:
    source, target = samples(600).float(), samples(530, seed=1, shift=0.5).float()
    expected = value_and_gradients(unbiased_mmd, source, target)
    with torch.autocast("cpu", dtype=dtype):
        found = value_and_gradients(unbiased_mmd, source, target)
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    with torch.autocast("cpu", dtype=dtype):
        half = value_and_gradients(unbiased_mmd, source.to(dtype), target.to(dtype))
    rounded = value_and_gradients(unbiased_mmd, source.to(dtype).float(), target.to(dtype).float())
    assert half[0] == rounded[0]
    assert [x.dtype for x in half[1]] == [dtype, dtype]


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, 300])
def test_compiled(count: int) -> None:
    """Few samples make one graph; many break it, and come out the same."""
    torch._dynamo.reset()
    source, target = samples(count).float(), samples(count, seed=1, shift=0.5).float()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return 2.0 * unbiased_mmd(s.relu(), t)

    breaks = torch._dynamo.explain(loss)(source.requires_grad_(), target).graph_break_count
    assert breaks == 0 if count == 20 else breaks > 0
    torch._dynamo.reset()
    found = value_and_gradients(torch.compile(loss, backend="aot_eager", fullgraph=count == 20), source, target)
    expected = value_and_gradients(loss, source, target)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    torch._dynamo.reset()


# ---------------------------------------------------------------- cost
class Watch(TorchDispatchMode):
    """The largest tensor that was made, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operations = 0, list[str]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        self.operations.append(str(function))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            self.largest = max(self.largest, value.numel() if isinstance(value, Tensor) else 0)
        return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_tensor_beyond_the_features_and_a_block(estimator: Callable[..., Tensor]) -> None:
    source, target = samples(1100, 3).requires_grad_(), samples(1030, 3, seed=1).requires_grad_()
    with Watch() as watch:
        estimator(source, target).backward()
    assert watch.largest == CPU_ROWS**2
    source, target = samples(20, 300).requires_grad_(), samples(20, 300, seed=1).requires_grad_()
    with Watch() as watch:
        estimator(source, target).backward()
    assert watch.largest == 40 * 300


def test_each_pair_of_blocks_once_and_one_exponential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise_mmd, "CPU_ROWS", 4)
    with Watch() as watch:  # 3 blocks of the source and 2 of the target: 5 on the diagonal and 10 above it
        unbiased_mmd(samples(9).requires_grad_(), samples(6).requires_grad_()).backward()
    assert sum("aten.exp" in name for name in watch.operations) == 15
    # a Gram matrix of each, its product with the columns' features, and above the diagonal with the rows'
    assert sum("addmm" in name for name in watch.operations) == 15 + 15 + 10
    # and nothing for a gradient that nobody asks for
    with Watch() as watch:
        unbiased_mmd(samples(9), samples(6))
    assert sum("addmm" in name for name in watch.operations) == 15
    with Watch() as watch, torch.no_grad():
        unbiased_mmd(samples(9).requires_grad_(), samples(6))
    assert sum("addmm" in name for name in watch.operations) == 15


@pytest.mark.parametrize(("rows", "products"), [(29, 3 + 3 + 1), (30, 1 + 1)])
def test_few_samples_are_one_block(rows: int, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as half a block has rows; of one sample more each domain has a block of its own."""
    monkeypatch.setattr(blockwise_mmd, "CPU_ROWS", rows)
    with Watch() as watch:
        unbiased_mmd(samples(9).requires_grad_(), samples(6).requires_grad_()).backward()
    assert sum("addmm" in name for name in watch.operations) == products
