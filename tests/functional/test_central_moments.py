"""The central moment discrepancy against loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import central_moment_discrepancies


def samples(count: int, width: int = 3, seed: int = 0, power: float = 1.0) -> Tensor:
    return torch.rand(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** power


def loop_terms(source: Tensor, target: Tensor, moments: int, length: float) -> list[float]:
    def moment(rows: list[list[float]], feature: int, order: int) -> float:
        column = [row[feature] for row in rows]
        mean = sum(column) / len(column)
        return mean if order == 1 else sum((value - mean) ** order for value in column) / len(column)

    s, t = source.tolist(), target.tolist()
    return [
        math.sqrt(sum((moment(s, j, k) - moment(t, j, k)) ** 2 for j in range(len(s[0])))) / length**k
        for k in range(1, moments + 1)
    ]


@pytest.mark.parametrize("moments", [1, 2, 5])
@pytest.mark.parametrize("length", [1.0, 2.0])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 9), (1, 3)])
def test_against_a_loop(moments: int, length: float, sizes: tuple[int, int]) -> None:
    source, target = samples(sizes[0]), samples(sizes[1], seed=1, power=2.0)
    found = central_moment_discrepancies(source, target, moments, length)
    assert found.tolist() == pytest.approx(loop_terms(source, target, moments, length), abs=1e-14)


def test_closed_form() -> None:
    # uniform on [0, 1]: mean 1/2, central moments 1/12, 0, 1/80, 0; all mass at the two ends: 1/2, 1/4, 0, 1/16, 0
    uniform = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    expected = [0, 1 / 4 - 1 / 12, 0, 1 / 16 - 1 / 80, 0]
    assert central_moment_discrepancies(uniform, ends).tolist() == pytest.approx(expected, abs=1e-4)


def test_gradients() -> None:
    inputs = samples(5).requires_grad_(), samples(4, seed=1, power=2.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: central_moment_discrepancies(s, t, 5, 1.5), inputs)


@pytest.mark.parametrize(("dtype", "compiled"), [(torch.float32, False), (torch.float64, False), (torch.float32, True)])
def test_equal_samples_have_a_gradient_of_0_and_not_nan(dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    function = torch.compile(central_moment_discrepancies, backend="aot_eager") if compiled else None
    source = samples(6).to(dtype).requires_grad_()
    terms = (function or central_moment_discrepancies)(source, source.detach().clone())
    (gradient,) = torch.autograd.grad(terms.sum(), source)
    assert terms.abs().max() == 0
    assert gradient.abs().max() == 0


def test_one_equal_moment_does_not_stop_the_others() -> None:
    # a mirror image: even moments are equal to the last bit, odd ones are not
    source = torch.tensor([[-0.5], [-0.25], [0.75]], requires_grad=True)
    terms = central_moment_discrepancies(source, -source.detach())
    assert [bool(term > 0) for term in terms] == [False, False, True, False, True]
    (gradient,) = torch.autograd.grad(terms.sum(), source)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0.01


def test_invariances() -> None:
    source, target = samples(6), samples(5, seed=1, power=2.0)
    expected = central_moment_discrepancies(source, target)
    torch.testing.assert_close(central_moment_discrepancies(source.flip(0), target.flip(0)), expected)
    torch.testing.assert_close(central_moment_discrepancies(target, source), expected)
    torch.testing.assert_close(central_moment_discrepancies(source.flip(1), target.flip(1)), expected)
    torch.testing.assert_close(central_moment_discrepancies(source - 7, target - 7), expected)
    torch.testing.assert_close(central_moment_discrepancies(source * 2 - 1, target * 2 - 1, length=2.0), expected)


def test_autocast_and_half_precision() -> None:
    source, target = samples(8).float(), samples(8, seed=1, power=2.0).float()
    expected = central_moment_discrepancies(source, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(central_moment_discrepancies(source, target), expected)
        found = central_moment_discrepancies(source.bfloat16(), target.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-3)


def test_errors() -> None:
    with pytest.raises(ConfigurationError, match="`moments` to be at least 1, but got 0"):
        central_moment_discrepancies(samples(3), samples(3), moments=0)
    with pytest.raises(ConfigurationError, match=r"`length` to be above 0, but got 0\.0"):
        central_moment_discrepancies(samples(3), samples(3), length=0.0)
    with pytest.raises(ConfigurationError, match="same number of features"):
        central_moment_discrepancies(samples(3), samples(3, 2))
