"""The queue of keys and the copy that follows: against plain lists and loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.networks import KeyQueue, MomentumCopy


def contents(queue: KeyQueue, label: int) -> list[float]:
    return sorted(queue.keys[label, : int(queue.filled[label]), 0].tolist())


@pytest.mark.parametrize("batch", [1, 3, 8, 30])  # thirty: more of a class at once than it has places
def test_holds_the_newest_of_each_class(batch: int) -> None:
    queue, lists = KeyQueue(3, 4, 2), [[], [], []]  # type: ignore[var-annotated]
    number = 0.0
    for _ in range(6):
        labels = torch.randint(3, (batch,))
        keys = torch.arange(batch)[:, None].expand(batch, 2) + number
        queue.add(keys, labels)
        number += batch
        for key, label in zip(keys, labels.tolist(), strict=True):
            lists[label] = [*lists[label], float(key[0])][-4:]
        assert [contents(queue, label) for label in range(3)] == [sorted(values) for values in lists]
        assert queue.seen.sum() == number
    assert torch.equal(queue.keys[..., 0], queue.keys[..., 1])


def test_keys_of_several_batches_end_where_one_large_batch_puts_them() -> None:
    """So the queues of two processes that gather their batches are those of one process."""
    keys, labels = torch.randn(40, 2), torch.randint(3, (40,))
    whole, parts = KeyQueue(3, 5, 2), KeyQueue(3, 5, 2)
    whole.add(keys, labels)
    for i in range(0, 40, 8):
        parts.add(keys[i : i + 8], labels[i : i + 8])
    assert torch.equal(whole.keys, parts.keys)
    assert torch.equal(whole.seen, parts.seen)


def test_the_queue_is_in_the_state_dict() -> None:
    queue, again = KeyQueue(3, 4, 2), KeyQueue(3, 4, 2)
    queue.add(torch.randn(5, 2), torch.tensor([0, 1, 1, 2, 1]))
    again.load_state_dict(queue.state_dict())
    assert torch.equal(again.keys, queue.keys)
    assert again.filled.tolist() == [1, 3, 1]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_the_copy_is_a_moving_average() -> None:
    first, second = network(), nn.Linear(4, 2)
    follower = MomentumCopy(first, second, momentum=0.9)
    expected = [p.detach().clone() for part in (first, second) for p in part.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for parameter in [*first.parameters(), *second.parameters()]:
                parameter.add_(torch.randn_like(parameter))
        follower.follow(first, second)
        for i, parameter in enumerate([*first.parameters(), *second.parameters()]):
            expected[i] = 0.9 * expected[i] + 0.1 * parameter.detach()
    for found, value in zip(follower.parameters(), expected, strict=True):
        torch.testing.assert_close(found, value)
        assert not found.requires_grad


def test_the_copy_has_the_modes_of_the_originals_and_no_graph() -> None:
    original = network().eval()
    follower = MomentumCopy(original).train()
    follower.follow(original)
    assert not any(part.training for part in follower.copies[0].modules())
    inputs = torch.randn(5, 3, requires_grad=True)
    assert torch.equal(follower(inputs), original(inputs))
    assert not follower(inputs).requires_grad
    original.train()
    follower.follow(original)
    before = follower.copies[0][1].running_mean.clone()  # type: ignore[index,union-attr,operator]
    follower(inputs)
    assert not torch.equal(before, follower.copies[0][1].running_mean)  # type: ignore[index,arg-type]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends(momentum: float) -> None:
    original = network()
    follower, start = MomentumCopy(original, momentum=momentum), network()
    start.load_state_dict(original.state_dict())
    with torch.no_grad():
        original[0].weight.add_(1)  # type: ignore[operator]
    follower.follow(original)
    expected = original if momentum == 0 else start
    torch.testing.assert_close(follower.copies[0][0].weight, expected[0].weight)  # type: ignore[index]
