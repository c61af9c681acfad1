"""Couplings against linear programming, the assignment problem and POT."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from framework.errors import ConfigurationError
from framework.functional import exact_coupling, sinkhorn_coupling


def cost(n: int, m: int, kind: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(n, 1, 3, dtype=kind) - torch.randn(1, m, 3, dtype=kind)).square().sum(-1)


def least_cost(matrix: torch.Tensor) -> float:
    """The linear programme itself."""
    optimize = pytest.importorskip("scipy.optimize")
    n, m = matrix.shape
    rows = [np.outer(np.eye(n)[i], np.ones(m)).ravel() for i in range(n)]
    columns = [np.outer(np.ones(n), np.eye(m)[j]).ravel() for j in range(m)]
    equalities = {"A_eq": np.array(rows + columns), "b_eq": [1 / n] * n + [1 / m] * m}
    return float(optimize.linprog(matrix.numpy().ravel(), **equalities).fun)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(8, 8), (5, 9), (9, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize(("regularization", "iterations"), [(0.05, 50), (0.001, 3), (10.0, 1)])
def test_marginals_are_exact_however_few_the_iterations(
    n: int, m: int, regularization: float, iterations: int, kind: torch.dtype
) -> None:
    coupling = sinkhorn_coupling(cost(n, m, kind), regularization, iterations)
    tolerance = 1e-6 if kind == torch.float32 else 1e-14
    assert coupling.dtype == kind
    assert coupling.min() >= 0
    torch.testing.assert_close(coupling.sum(1), torch.full((n,), 1 / n, dtype=kind), rtol=0, atol=tolerance)
    torch.testing.assert_close(coupling.sum(0), torch.full((m,), 1 / m, dtype=kind), rtol=0, atol=tolerance)


def test_sinkhorn_against_its_published_form() -> None:
    """Cuturi's: scale the rows and the columns of exp(-cost / regularisation) in turn."""
    matrix = cost(6, 8)
    above = (matrix - matrix.min()).numpy()
    kernel = np.exp(-above / (0.5 * above.mean()))
    columns = np.ones(8)
    for _ in range(200):
        rows = (1 / 6) / (kernel @ columns)
        columns = (1 / 8) / (kernel.T @ rows)
    expected = rows[:, None] * kernel * columns
    np.testing.assert_allclose(sinkhorn_coupling(matrix, 0.5, 200).numpy(), expected, rtol=1e-8)


def test_sinkhorn_in_the_limit_is_the_best_assignment() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    matrix = cost(7, 7)
    rows, columns = optimize.linear_sum_assignment(matrix.numpy())
    expected = np.zeros((7, 7))
    expected[rows, columns] = 1 / 7
    np.testing.assert_allclose(sinkhorn_coupling(matrix, 0.002, 3000).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 6)])
def test_costs_against_linear_programming(n: int, m: int) -> None:
    matrix = cost(n, m)
    least = least_cost(matrix)
    costs = [float((sinkhorn_coupling(matrix, eps, 2000) * matrix).sum()) for eps in (1.0, 0.1, 0.005)]
    assert costs == sorted(costs, reverse=True)  # the less entropy, the cheaper
    assert least - 1e-9 <= costs[-1] <= 1.01 * least
    # the defaults, at their price
    assert least - 1e-9 <= float((sinkhorn_coupling(matrix) * matrix).sum()) <= 1.15 * least


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 6)])
def test_exact_against_linear_programming(n: int, m: int) -> None:
    pytest.importorskip("ot")
    matrix = cost(n, m)
    coupling = exact_coupling(matrix)
    assert float((coupling * matrix).sum()) == pytest.approx(least_cost(matrix), rel=1e-8)
    torch.testing.assert_close(coupling.sum(1), torch.full((n,), 1 / n, dtype=torch.float64))
    torch.testing.assert_close(coupling.sum(0), torch.full((m,), 1 / m, dtype=torch.float64))
    assert exact_coupling(matrix.float()).dtype == torch.float32


def test_unit_and_offset_of_the_cost_play_no_part() -> None:
    matrix = cost(6, 8)
    expected = sinkhorn_coupling(matrix)
    torch.testing.assert_close(sinkhorn_coupling(1e-6 * matrix), expected)
    torch.testing.assert_close(sinkhorn_coupling(matrix + 100.0), expected)


def test_equal_costs_move_all_to_all() -> None:
    for value in (0.0, 3.0):
        coupling = sinkhorn_coupling(torch.full((3, 4), value))
        torch.testing.assert_close(coupling, torch.full((3, 4), 1 / 12))


def test_no_gradient() -> None:
    matrix = cost(4, 4).requires_grad_()
    assert not sinkhorn_coupling(matrix).requires_grad


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'transfer-framework\[transport\]'"):
        exact_coupling(torch.eye(2))


def test_bad_values() -> None:
    with pytest.raises(ConfigurationError, match="`entropic_regularization` to be above 0"):
        sinkhorn_coupling(torch.eye(2), 0.0)
    with pytest.raises(ConfigurationError, match="`iterations` to be at least 1"):
        sinkhorn_coupling(torch.eye(2), iterations=0)
    with pytest.raises(ConfigurationError, match="`cost` to have shape"):
        sinkhorn_coupling(torch.ones(3))
