"""Multilinear maps against loops and against the theorem that justifies the randomised one."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import framework.functional.multilinear
from framework.errors import ConfigurationError
from framework.functional import multilinear_map, randomized_multilinear_map


def inputs(count: int = 4, features: int = 3, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(count, classes, dtype=torch.float64)
    return torch.randn(count, features, dtype=torch.float64), logits.softmax(dim=1)


def test_outer_product_against_a_loop() -> None:
    features, probabilities = inputs()
    found = multilinear_map(features, probabilities)
    expected = [[float(f * p) for f in row for p in probabilities[n]] for n, row in enumerate(features)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_randomised_against_a_loop() -> None:
    features, probabilities = inputs()
    first, second = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    found = randomized_multilinear_map(features, probabilities, first, second)
    for n in range(4):
        for j in range(7):
            f = sum(float(features[n, d] * first[d, j]) for d in range(3))
            p = sum(float(probabilities[n, k] * second[k, j]) for k in range(5))
            assert float(found[n, j]) == pytest.approx(f * p / math.sqrt(7))


def test_inner_products_are_kept_in_expectation() -> None:
    """Theorem 1 of the paper; without the 1/sqrt(d) or with another one, inner products would be off by a factor."""
    features, probabilities = inputs()
    full = multilinear_map(features, probabilities)
    draws = []
    for _ in range(60):
        first, second = torch.randn(3, 512, dtype=torch.float64), torch.randn(5, 512, dtype=torch.float64)
        mapped = randomized_multilinear_map(features, probabilities, first, second)
        draws.append(mapped @ mapped.T)
    values, expected = torch.stack(draws), full @ full.T
    error = values.std(dim=0) / math.sqrt(len(draws))
    assert ((values.mean(dim=0) - expected).abs() < 4.5 * error).all()
    assert (error < 0.1 * expected.diagonal().max()).all()


def test_gradients() -> None:
    features, probabilities = (value.requires_grad_() for value in inputs())
    first, second = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(multilinear_map, (features, probabilities))
    assert torch.autograd.gradcheck(
        lambda f, p: randomized_multilinear_map(f, p, first, second), (features, probabilities)
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_float32_under_autocast(compiled: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(randomized_multilinear_map, fullgraph=True, backend=counter)
    function = function if compiled else randomized_multilinear_map
    features, probabilities = (value.float() for value in inputs())
    features.requires_grad_()
    first, second = torch.randn(3, 64), torch.randn(5, 64)
    gradients = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = (function if autocast else randomized_multilinear_map)(features, probabilities, first, second)
            assert found.dtype == torch.float32
            gradients.append(torch.autograd.grad(found.square().sum(), features)[0])
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


@pytest.mark.parametrize("shapes", [((4, 3), (5, 2)), ((4,), (4, 2))])
def test_other_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ConfigurationError, match="Expected `features`"):
        multilinear_map(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ConfigurationError, match="Expected `features`"):
        randomized_multilinear_map(*(torch.zeros(shape) for shape in shapes), torch.zeros(3, 4), torch.zeros(2, 4))


def test_examples() -> None:
    assert doctest.testmod(framework.functional.multilinear, extraglobs={"torch": torch}) == (0, 3)
