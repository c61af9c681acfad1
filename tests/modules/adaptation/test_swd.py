"""The discrepancy of SWD; its steps are MCD's and tested there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import numpy as np
import pytest
import torch

from framework.errors import ConfigurationError
from framework.functional import random_directions
from framework.modules import MCD, SWD


def method(**options: Any) -> SWD:
    return SWD(4, backbone="resnet8", classifier_features=8, **options)


def test_discrepancy_against_a_loop() -> None:
    """Algorithm 1: project, sort, square, on probabilities."""
    first, second = torch.randn(2, 9, 4, dtype=torch.float64).unbind()
    module = method(projections=6)
    torch.manual_seed(5)
    value = module.discrepancy(first, second)
    torch.manual_seed(5)
    directions = random_directions(6, first).numpy()
    p, q = (np.exp(x.numpy()) / np.exp(x.numpy()).sum(1, keepdims=True) for x in (first, second))
    total = 0.0
    for direction in directions:
        total += ((np.sort(p @ direction) - np.sort(q @ direction)) ** 2).mean() / 6
    assert float(value) == pytest.approx(total, rel=1e-10)


def test_it_compares_the_clouds_and_not_the_images() -> None:
    """Where each head has the other's predictions in another order, MCD sees a difference and SWD none."""
    first = 5 * torch.eye(4)
    second = first.roll(1, 0)
    assert float(method().discrepancy(first, second)) == pytest.approx(0.0, abs=1e-10)
    assert float(MCD(4, backbone="resnet8", classifier_features=8).discrepancy(first, second)) > 0.4


def test_gradient() -> None:
    module = method(projections=5)

    def discrepancy(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return module.discrepancy(first, second)

    first, second = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(discrepancy, (first, second))


def test_right_under_autocast() -> None:
    module = method()
    first, second = torch.randn(2, 9, 4).unbind()
    torch.manual_seed(0)
    expected = module.discrepancy(first, second)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module.discrepancy(first, second), expected)


def test_directions_are_fresh_in_every_step(domains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorded(count: int, like: torch.Tensor) -> torch.Tensor:
        seen.append(random_directions(count, like))
        return seen[-1]

    monkeypatch.setattr("framework.modules.adaptation.swd.random_directions", recorded)
    contract.fit(SWD, domains, model={"projections": 3, "generator_steps": 2}, max_epochs=1, limit_val_batches=0)
    assert len(seen) == 5 * 3
    assert all(directions.shape == (3, 3) for directions in seen)
    assert len({float(directions[0, 0]) for directions in seen}) == 15


def test_bad_values_name_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.projections"):
        method(projections=0)
