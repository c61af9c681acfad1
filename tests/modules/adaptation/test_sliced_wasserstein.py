"""The loss of SlicedWasserstein: what it draws, and what it measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import toy_accuracy

from framework.errors import ConfigurationError
from framework.functional import random_directions, sliced_wasserstein
from framework.modules import SlicedWasserstein
from framework.modules.adaptation.sliced_wasserstein import SlicedWassersteinLoss
from framework.networks import NetworkOutputs

ZERO = torch.tensor(0.0)


def outputs(count: int, shift: float = 0.0, width: int = 5) -> NetworkOutputs:
    return NetworkOutputs(torch.randn(count, width) + shift, torch.randn(count, 3))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("count", [8, 11])
def test_it_is_the_distance_along_fresh_directions(order: int, count: int) -> None:
    source, target, loss = outputs(8), outputs(count, 1.0), SlicedWassersteinLoss(7, order)
    torch.manual_seed(3)
    value = loss(source, target, ZERO)
    assert not torch.equal(loss(source, target, ZERO), value)  # drawn anew
    torch.manual_seed(3)
    directions = random_directions(7, source.features)
    assert torch.equal(value, sliced_wasserstein(source.features, target.features, directions, order))


def test_the_number_of_projections_is_the_option() -> None:
    """pytorch-adapt's SlicedWasserstein(m) ignores m."""
    source, target = outputs(8, width=64), outputs(8, 1.0, width=64)

    def spread(count: int) -> float:
        loss = SlicedWasserstein(3, backbone="resnet8", projections=count).alignment
        return float(torch.stack([loss(source, target, ZERO) for _ in range(30)]).std())

    assert spread(256) < 0.4 * spread(4)  # 0.125 in expectation


def test_diagnostics() -> None:
    loss = SlicedWassersteinLoss(512)
    loss(outputs(400), outputs(400), ZERO)
    assert loss.diagnostics["relative_sliced_wasserstein"] < 0.05
    value = loss(outputs(400), outputs(400, 6.0), ZERO)
    assert torch.equal(loss.diagnostics["sliced_wasserstein"], value)
    near = loss.diagnostics["relative_sliced_wasserstein"]
    assert 2.0 < near < 4.0  # of two points: the squared distance over a quarter of it
    source, target = outputs(400), outputs(400, 6.0)
    loss(source._replace(features=100 * source.features), target._replace(features=100 * target.features), ZERO)
    torch.testing.assert_close(loss.diagnostics["relative_sliced_wasserstein"], near, rtol=0.1, atol=0)


def test_complaint() -> None:
    loss = SlicedWassersteinLoss()
    ((key, sentence),) = loss.complaints({"train/relative_sliced_wasserstein": 1.5}, 0.6)
    assert key == "sliced_wasserstein"
    assert "1.50" in sentence
    assert "--model.trade_off" in sentence
    assert not list(loss.complaints({"train/relative_sliced_wasserstein": 1.5}, 0.1))
    assert not list(loss.complaints({"train/relative_sliced_wasserstein": 0.2}, 0.6))


@pytest.mark.parametrize(("option", "value"), [("projections", 0), ("order", 3)])
def test_bad_values_name_the_flag(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"--model\.{option}"):
        SlicedWasserstein(3, backbone="resnet8", **{option: value})


@pytest.mark.parametrize("order", [1, 2])
def test_it_helps_on_a_toy(order: int) -> None:
    source_only = [toy_accuracy(None, "rotation", seed=seed, steps=150) for seed in (1, 2)]
    adapted = [toy_accuracy(SlicedWassersteinLoss(64, order), "rotation", seed=seed, steps=150) for seed in (1, 2)]
    assert max(source_only) < 0.95
    assert min(adapted) > 0.98
