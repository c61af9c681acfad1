"""The sliced Wasserstein distance against scipy, loops, linear programming and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from framework.errors import ConfigurationError
from framework.functional import random_directions, sliced_wasserstein

ONE = torch.ones(1, 1, dtype=torch.float64)


def line(source: torch.Tensor, target: torch.Tensor, order: int) -> float:
    return float(sliced_wasserstein(source[:, None], target[:, None], ONE, order))


@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 8), (8, 5), (6, 4), (1, 9), (9, 1)])
def test_order_1_on_a_line_against_scipy(n: int, m: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    source, target = torch.randn(n, dtype=torch.float64), torch.randn(m, dtype=torch.float64) + 0.5
    assert line(source, target, 1) == pytest.approx(stats.wasserstein_distance(source, target), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 8), (6, 4)])
def test_on_a_line_against_copies_of_every_point(n: int, m: int, order: int) -> None:
    """Each source point M times and each target point N times: as many on both sides, matched in their order."""
    source, target = torch.randn(n, dtype=torch.float64), torch.randn(m, dtype=torch.float64) + 0.5
    pairs = zip(sorted(source.tolist() * m), sorted(target.tolist() * n), strict=True)
    expected = sum(abs(a - b) ** order for a, b in pairs) / (n * m)
    assert line(source, target, order) == pytest.approx(expected, rel=1e-12)


def test_on_a_line_it_is_the_best_transport() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    source, target = torch.randn(3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    cost = (source[:, None] - target[None, :]).square().numpy()
    rows = [np.outer(np.eye(3)[i], np.ones(4)).ravel() for i in range(3)]
    columns = [np.outer(np.ones(3), np.eye(4)[j]).ravel() for j in range(4)]
    found = optimize.linprog(cost.ravel(), A_eq=np.array(rows + columns), b_eq=[1 / 3] * 3 + [1 / 4] * 4)
    assert line(source, target, 2) == pytest.approx(found.fun, rel=1e-8)


def test_value_against_a_loop_over_directions() -> None:
    source, target = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    directions = random_directions(5, source)
    total = 0.0
    for direction in directions.numpy():
        a, b = np.sort(source.numpy() @ direction), np.sort(target.numpy() @ direction)
        total += ((a - b) ** 2).mean() / 5
    assert float(sliced_wasserstein(source, target, directions)) == pytest.approx(total, rel=1e-12)


def test_a_translation_in_closed_form() -> None:
    """E (direction . shift)^2 = |shift|^2 / D: every projection is only shifted."""
    source, shift = torch.randn(20, 4, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    value = sliced_wasserstein(source, source[torch.randperm(20)] + shift, random_directions(20_000, source))
    assert float(value) == pytest.approx(float(shift.square().sum()) / 4, rel=0.03)


def test_the_number_of_projections_counts() -> None:
    """pytorch-adapt's SlicedWasserstein(m) ignores m: its estimate gets no better with more."""
    source, target = torch.randn(9, 16), torch.randn(9, 16) + 1
    assert random_directions(7, source).shape == (7, 16)

    def spread(count: int) -> float:
        values = [sliced_wasserstein(source, target, random_directions(count, source)) for _ in range(50)]
        return float(torch.stack(values).std())

    assert spread(400) < 0.2 * spread(4)  # 0.1 in expectation


def test_directions() -> None:
    directions = random_directions(5000, torch.zeros(2, 3, dtype=torch.bfloat16))
    assert directions.dtype == torch.float32
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(5000))
    assert directions.mean(dim=0).abs().max() < 0.05  # no side preferred
    torch.testing.assert_close(directions.T @ directions / 5000, torch.eye(3) / 3, atol=0.02, rtol=0)
    assert random_directions(2, torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("m", [5, 7])
def test_gradients(order: int, m: int) -> None:
    source = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(m, 3, dtype=torch.float64, requires_grad=True)
    directions = random_directions(6, source)
    assert torch.autograd.gradcheck(lambda a, b: sliced_wasserstein(a, b, directions, order), (source, target))


@pytest.mark.parametrize("order", [1, 2])
def test_equal_samples_in_any_order_are_at_distance_0(order: int) -> None:
    source = torch.randn(8, 3)
    target = source[torch.randperm(8)].requires_grad_()
    value = sliced_wasserstein(source, target, random_directions(6, source), order)
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.grad(value, target)[0].abs().max() < 1e-6
    double = torch.cat([source, source])  # the same distribution, with twice the samples
    assert float(sliced_wasserstein(double, source, random_directions(6, source), order)) < 1e-6


def test_bf16() -> None:
    source, target = torch.randn(8, 3).bfloat16(), torch.randn(8, 3).bfloat16()
    directions = random_directions(6, source)
    with torch.autocast("cpu", torch.bfloat16):
        value = sliced_wasserstein(source, target, directions)
    torch.testing.assert_close(value, sliced_wasserstein(source.float(), target.float(), directions))


def test_bad_values() -> None:
    source = torch.randn(4, 3)
    with pytest.raises(ConfigurationError, match=r"`directions` to have shape \[directions, 3\], but got \[5, 2\]"):
        sliced_wasserstein(source, source, torch.randn(5, 2))
    with pytest.raises(ConfigurationError, match="`order` to be 1 or 2, but got 3"):
        sliced_wasserstein(source, source, torch.randn(5, 3), order=3)
    with pytest.raises(ConfigurationError, match="same number of features"):
        sliced_wasserstein(source, torch.randn(4, 2), torch.randn(5, 3))
