from __future__ import annotations

import math

import pytest
import torch

from framework.functional import class_balance, classifier_discrepancy


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def test_discrepancy_against_a_loop() -> None:
    first, second = torch.randn(2, 7, 4, dtype=torch.float64)
    total = 0.0
    for p, q in zip(first.tolist(), second.tolist(), strict=True):
        total += sum(abs(a - b) for a, b in zip(softmax(p), softmax(q), strict=True))
    assert float(classifier_discrepancy(first, second)) == pytest.approx(total / 28, rel=1e-12)


def test_class_balance_against_a_loop() -> None:
    logits = torch.randn(7, 4, dtype=torch.float64)
    rows = [softmax(row) for row in logits.tolist()]
    means = [sum(row[k] for row in rows) / 7 for k in range(4)]
    assert float(class_balance(logits)) == pytest.approx(-sum(map(math.log, means)) / 4, rel=1e-12)


def test_class_balance_of_a_class_that_nobody_predicts() -> None:
    """The published codes add 1e-6 in the logarithm: then the gradient that would bring the class back is lost."""
    logits = torch.tensor([[0.0, -120.0]] * 3, requires_grad=True)
    value = class_balance(logits)
    assert float(value.detach()) == pytest.approx(60.0)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0]] * 3) / 6)


def test_gradients() -> None:
    first, second = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_().unbind()
    assert torch.autograd.gradcheck(classifier_discrepancy, (first, second))
    assert torch.autograd.gradcheck(class_balance, (first,))


def test_bounds_and_symmetry() -> None:
    first = torch.randn(9, 5)
    assert float(classifier_discrepancy(first, first)) == 0.0
    assert float(classifier_discrepancy(first, first + 3.0)) == pytest.approx(
        0.0, abs=1e-6
    )  # logits, not probabilities
    certain = 99 * torch.eye(5)
    assert float(classifier_discrepancy(certain, certain.roll(1, 0))) == pytest.approx(2 / 5)
    second = torch.randn(9, 5)
    torch.testing.assert_close(classifier_discrepancy(first, second), classifier_discrepancy(second, first))
    assert float(class_balance(first)) >= math.log(5)


def test_bf16_logits() -> None:
    first, second = torch.randn(2, 9, 5).bfloat16()
    assert classifier_discrepancy(first, second).dtype == torch.float32
    torch.testing.assert_close(
        classifier_discrepancy(first, second), classifier_discrepancy(first.float(), second.float())
    )
