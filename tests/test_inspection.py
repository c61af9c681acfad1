"""Looking at a network leaves no trace."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from framework.inspection import epoch_is_due, undisturbed


def mixed() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))
    network[1].eval()  # as a frozen part
    return network


def states() -> tuple[Any, ...]:
    return torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("breaks", [False, True])
def test_modes_are_put_back(breaks: bool) -> None:
    network = mixed()
    modes = [part.training for part in network.modules()]
    try:
        with undisturbed(network):
            assert not any(part.training for part in network.modules())
            assert not network(torch.randn(4, 3)).requires_grad
            if breaks:
                raise KeyError
    except KeyError:
        assert breaks
    assert [part.training for part in network.modules()] == modes
    assert modes != [network.training] * len(modes)
    assert torch.is_grad_enabled()


def test_random_numbers_and_statistics_are_as_before() -> None:
    network = mixed()
    before, kept = states(), {name: value.clone() for name, value in network.state_dict().items()}
    with undisturbed(network):
        torch.manual_seed(5)
        network(torch.randn(4, 3))
        random.random()
        np.random.rand()
    assert states() == before
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("epoch", "step", "options", "due"),
    [
        (0, 10, {}, False),
        (1, 20, {}, True),
        (2, 30, {}, False),
        (3, 40, {}, True),
        (6, 70, {}, True),  # the last of seven
        (2, 30, {"max_steps": 30}, True),
        (2, 30, {"max_steps": 31}, False),
        (6, 70, {"max_epochs": None}, False),
    ],
)
def test_what_is_due(epoch: int, step: int, options: dict[str, Any], due: bool) -> None:
    values = {"current_epoch": epoch, "global_step": step, "max_epochs": 7, "max_steps": -1, **options}
    assert epoch_is_due(SimpleNamespace(**values), 2) == due  # type: ignore[arg-type]
