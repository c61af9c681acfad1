"""The entropies against a loop, and where a naive p log p breaks."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

import framework.functional.entropy
from framework.functional import marginal_entropy, prediction_entropy


def softmax(row: Tensor) -> list[float]:
    powers = [math.exp(float(z)) for z in row]
    return [power / sum(powers) for power in powers]


def test_against_a_loop() -> None:
    logits = torch.randn(7, 4, dtype=torch.float64) * 2
    rows = [softmax(row) for row in logits]
    expected = [-sum(p * math.log(p) for p in row) for row in rows]
    torch.testing.assert_close(prediction_entropy(logits), torch.tensor(expected, dtype=torch.float64))
    mean = [sum(row[k] for row in rows) / 7 for k in range(4)]
    assert float(marginal_entropy(logits)) == pytest.approx(-sum(p * math.log(p) for p in mean))


@pytest.mark.parametrize("function", [prediction_entropy, marginal_entropy])
def test_gradients(function) -> None:
    assert torch.autograd.gradcheck(function, torch.randn(5, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("function", [prediction_entropy, marginal_entropy])
def test_certain_predictions_have_finite_gradients(function) -> None:
    """``p * log(p)`` is NaN where a probability has rounded to 0."""
    logits = torch.tensor([[1000.0, 0.0, -1000.0], [1000.0, 0.0, -1000.0]], requires_grad=True)
    value = function(logits).sum()
    assert float(value.detach()) == 0
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_bounds() -> None:
    assert float(prediction_entropy(torch.zeros(1, 5))) == pytest.approx(math.log(5))
    assert float(marginal_entropy(100 * torch.eye(5))) == pytest.approx(math.log(5))
    assert float(marginal_entropy(torch.tensor([[9.0, 0.0]] * 3))) < 0.01


def test_examples() -> None:
    assert doctest.testmod(framework.functional.entropy, extraglobs={"torch": torch}) == (0, 2)


def test_marginal_entropy_of_several_batches() -> None:
    logits = 3 * torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    found = marginal_entropy(logits)
    assert found.shape == (2, 4)
    for i in range(2):
        for j in range(4):
            torch.testing.assert_close(found[i, j], marginal_entropy(logits[i, j]))
