"""The class confusion against loops written from the paper's equations."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

import framework.functional.confusion
from framework.functional import class_confusion


def by_loops(logits: Tensor, temperature: float) -> Tensor:
    """Jin et al. 2020: temperature, weights, confusion, rows."""
    images, classes = logits.shape
    probabilities = []
    for row in logits.tolist():
        powers = [math.exp(z / temperature) for z in row]
        probabilities.append([power / sum(powers) for power in powers])
    entropies = [-sum(p * math.log(p) for p in row) for row in probabilities]
    certainties = [1 + math.exp(-entropy) for entropy in entropies]
    weights = [images * certainty / sum(certainties) for certainty in certainties]
    confusion = torch.zeros(classes, classes, dtype=torch.float64)
    for j in range(classes):
        for k in range(classes):
            for i in range(images):
                confusion[j, k] += probabilities[i][j] * weights[i] * probabilities[i][k]
    rows = torch.zeros_like(confusion)
    for j in range(classes):
        for k in range(classes):
            rows[j, k] = confusion[j, k] / sum(float(confusion[j, other]) for other in range(classes))
    return rows


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_loops(temperature: float) -> None:
    logits = 3 * torch.randn(6, 4, dtype=torch.float64) + torch.tensor([2.0, 0.0, 0.0, -1.0])
    torch.testing.assert_close(class_confusion(logits, temperature), by_loops(logits, temperature))


def test_rows_are_distributions_and_columns_are_not() -> None:
    """TLlib divides the columns by the sums of the rows, which transposes the matrix; its off-diagonal sum stays."""
    logits = 3 * torch.randn(6, 4, dtype=torch.float64) + torch.tensor([2.0, 0.0, 0.0, -1.0])
    confusion = class_confusion(logits)
    torch.testing.assert_close(confusion.sum(1), torch.ones(4, dtype=torch.float64))
    assert (confusion.sum(0) - 1).abs().max() > 0.1


def test_an_empty_class_gives_neither_nan_nor_confusion() -> None:
    logits = torch.tensor([[9.0, 0.0, -1000.0], [0.0, 3.0, -1000.0]], requires_grad=True)
    confusion = class_confusion(logits)
    assert confusion.isfinite().all()
    assert torch.equal(confusion[2], torch.zeros(3))
    gradient = torch.autograd.grad(confusion.sum() - confusion.diagonal().sum(), logits)[0]
    assert gradient.isfinite().all()
    torch.testing.assert_close(confusion[:2, :2], class_confusion(logits[:, :2]))


def test_no_gradient_through_the_weights() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    first = class_confusion(logits)[0, 1]
    probabilities, scaled = logits.softmax(1), logits.detach()
    entropies = -(scaled.softmax(1) * scaled.log_softmax(1)).sum(1)
    weights = 5 * (1 + (-entropies).exp()) / (1 + (-entropies).exp()).sum()
    expected = (weights * probabilities[:, 0] * probabilities[:, 1]).sum() / (weights * probabilities[:, 0]).sum()
    torch.testing.assert_close(torch.autograd.grad(first, logits)[0], torch.autograd.grad(expected, logits)[0])


def test_gradient_stays_in_float32_when_compiled_under_autocast() -> None:
    logits = torch.randn(16, 5, requires_grad=True)

    def off_diagonal(logits: Tensor) -> Tensor:
        confusion = class_confusion(logits, 2.5)
        return confusion.sum() - confusion.diagonal().sum()

    expected = torch.autograd.grad(off_diagonal(logits), logits)[0]
    with torch.autocast("cpu", torch.bfloat16):
        value = torch.compile(off_diagonal, backend="aot_eager", fullgraph=True)(logits)
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], expected)
    torch._dynamo.reset()


def test_examples() -> None:
    assert doctest.testmod(framework.functional.confusion, extraglobs={"torch": torch}) == (0, 1)
