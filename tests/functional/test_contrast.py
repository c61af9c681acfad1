"""The contrast of Bi-Tuning: value against a loop, gradients, what the queue's places count for."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

import framework.functional.contrast
from framework.functional.contrast import queue_contrast, unit_length

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def arguments(images: int = 5, classes: int = 3, places: int = 4, width: int = 6) -> Arguments:
    queries = torch.randn(images, width, dtype=torch.float64)
    partners = torch.randn(images, width, dtype=torch.float64)
    queue = torch.randn(classes, places, width, dtype=torch.float64)
    queue /= queue.norm(dim=2, keepdim=True)
    return queries, partners, queue, torch.tensor([4, 0, 2]), torch.randint(classes, (images,))


def cosine(x: Tensor, y: Tensor) -> float:
    dot = sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(float(a) ** 2 for a in x)) / math.sqrt(sum(float(b) ** 2 for b in y))


def loop(queries: Tensor, partners: Tensor, queue: Tensor, filled: Tensor, labels: Tensor, temperature: float) -> float:
    total = 0.0
    for i in range(len(queries)):
        positive = [math.exp(cosine(queries[i], partners[i]) / temperature)]
        negative = []
        for label in range(len(queue)):
            for place in range(int(filled[label])):
                power = math.exp(cosine(queries[i], queue[label, place]) / temperature)
                (positive if label == int(labels[i]) else negative).append(power)
        everything = sum(positive) + sum(negative)
        total -= sum(math.log(power / everything) for power in positive) / len(positive)
    return total / len(queries)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_value_against_a_loop(temperature: float) -> None:
    given = arguments()
    assert float(queue_contrast(*given, temperature)) == pytest.approx(loop(*given, temperature))


def test_gradients() -> None:
    queries, partners, *rest = arguments()
    queries.requires_grad_()
    partners.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: queue_contrast(x, y, *rest, 0.5), (queries, partners))


def test_places_that_are_not_filled_take_no_part() -> None:
    queries, partners, queue, filled, labels = arguments()
    expected = queue_contrast(queries, partners, queue, filled, labels)
    changed = queue.clone()
    changed[1], changed[2, 2:] = 1e6, -1e6
    assert torch.equal(queue_contrast(queries, partners, changed, filled, labels), expected)
    fewer = queue_contrast(queries, partners, queue[:, :2], filled.clamp(max=2), labels)
    assert not torch.equal(fewer, expected)


def test_an_empty_queue_costs_nothing() -> None:
    queries, partners, queue, filled, labels = arguments()
    queries.requires_grad_()
    loss = queue_contrast(queries, partners, torch.zeros_like(queue), torch.zeros_like(filled), labels)
    assert float(loss) == 0
    assert torch.autograd.grad(loss, queries)[0].abs().max() == 0


def test_lengths_do_not_matter() -> None:
    queries, partners, *rest = arguments()
    scaled = queue_contrast(7 * queries, partners / 3, *rest)
    torch.testing.assert_close(scaled, queue_contrast(queries, partners, *rest))


def test_descending_turns_queries_to_their_class() -> None:
    _, _, queue, _, labels = arguments(images=12, places=1)
    filled = torch.ones(3, dtype=torch.long)
    queries = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([queries], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        queue_contrast(queries, queue[labels, 0], queue, filled, labels).backward()
        optimizer.step()
    assert (unit_length(queries) @ queue[:, 0].T).argmax(1).tolist() == labels.tolist()


def test_float32_under_autocast() -> None:
    queries, partners, queue, filled, labels = arguments(images=32, width=64)
    given = (queries.bfloat16(), partners.bfloat16(), queue.float(), filled, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = queue_contrast(*given)
        assert unit_length(given[0]).dtype == torch.float32
    assert torch.equal(found, queue_contrast(queries.bfloat16().float(), partners.bfloat16().float(), *given[2:]))


def test_examples() -> None:
    assert doctest.testmod(framework.functional.contrast, extraglobs={"torch": torch}) == (0, 3)
