"""The sums of singular values against numpy's; gradients where singular values are 0 or equal."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import framework.functional.spectral
from framework.functional import (
    largest_squared_singular_values,
    nuclear_norm,
    smallest_squared_singular_values,
)

FUNCTIONS = [
    nuclear_norm,
    largest_squared_singular_values,
    lambda x: largest_squared_singular_values(x, 3),
    smallest_squared_singular_values,
    lambda x: smallest_squared_singular_values(x, 3),
]
NAMES = ["nuclear", "largest", "three largest", "smallest", "three smallest"]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 6)])
def test_against_numpy(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    singular = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert float(nuclear_norm(matrix)) == pytest.approx(singular.sum(), rel=1e-12)
    for count in (1, 2, 9):
        value = float(largest_squared_singular_values(matrix, count))
        assert value == pytest.approx((singular[:count] ** 2).sum(), rel=1e-12)
        value = float(smallest_squared_singular_values(matrix, count))
        assert value == pytest.approx((singular[-count:] ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_a_small_singular_value_beside_a_large_one(shape: tuple[int, int]) -> None:
    """Off by more than itself where it is taken from the Gram matrix in float32."""
    left, _, right = np.linalg.svd(np.random.default_rng(0).standard_normal(shape), full_matrices=False)
    values = np.array([3000.0, *[1.0] * 14, 0.03])
    matrix = torch.from_numpy((left * values) @ right).float().requires_grad_()
    value = smallest_squared_singular_values(matrix)
    assert float(value) == pytest.approx(0.0009, rel=0.1)
    gradient = torch.autograd.grad(value, matrix)[0].numpy()
    np.testing.assert_allclose(gradient, 0.06 * np.outer(left[:, -1], right[-1]), atol=0.06 * 0.05)


@each_function
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_gradients(function: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, matrix)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_gradient_of_the_largest_is_its_singular_pair(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    left, values, right = np.linalg.svd(matrix.detach().numpy())
    gradient = torch.autograd.grad(largest_squared_singular_values(matrix), matrix)[0]
    np.testing.assert_allclose(gradient.numpy(), 2 * values[0] * np.outer(left[:, 0], right[0]), rtol=1e-8, atol=1e-10)


@each_function
@pytest.mark.parametrize(
    "matrix", [torch.zeros(5, 3), torch.ones(5, 3) / 3, torch.eye(4), torch.ones(3, 5) / 3], ids=str
)
def test_equal_or_zero_singular_values_have_finite_gradients(
    function: Callable[[Tensor], Tensor], matrix: Tensor
) -> None:
    """The derivative of an SVD divides by the differences of the singular values."""
    matrix = matrix.clone().requires_grad_()
    gradient = torch.autograd.grad(function(matrix), matrix)[0]
    assert gradient.isfinite().all()
    # the value is homogeneous, of degree 1 and 2: Euler's identity
    degree = 1 if function is nuclear_norm else 2
    torch.testing.assert_close((gradient * matrix).sum(), degree * function(matrix))


@each_function
def test_gradient_stays_in_float32_when_compiled_under_autocast(function: Callable[[Tensor], Tensor]) -> None:
    """A compiled ``svdvals`` has a bfloat16 product in its backward pass, wrong by 2e-3 here."""
    matrix = torch.rand(16, 5, requires_grad=True)
    expected = torch.autograd.grad(function(matrix), matrix)[0]
    with torch.autocast("cpu", torch.bfloat16):
        value = torch.compile(function, backend="aot_eager", fullgraph=True)(matrix)
    torch.testing.assert_close(torch.autograd.grad(value, matrix)[0], expected)
    torch._dynamo.reset()


def test_examples() -> None:
    assert doctest.testmod(framework.functional.spectral, extraglobs={"torch": torch}) == (0, 3)
