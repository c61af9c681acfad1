"""SimCLR: the loss of the task, and what it measures against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.functional import nt_xent
from framework.modules.pretraining.simclr import SimCLRTask, contrast_diagnostics


def directions(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_loss_is_of_the_projections() -> None:
    task = SimCLRTask(6, temperature=0.1, projection_features=4).eval()
    encode, images = nn.Flatten(), torch.randn(5, 2, 3, 1, 2)
    first, second = (task.projector(images[:, view].flatten(1)) for view in (0, 1))
    torch.testing.assert_close(task(encode, images), nt_xent(first, second, 0.1))
    assert task.diagnostics.keys() == {"contrast_accuracy", "alignment", "uniformity"}


@pytest.mark.parametrize("images", [2, 7])
def test_diagnostics_against_loops(images: int) -> None:
    first, second = (torch.randn(images, 3, dtype=torch.float64) for _ in range(2))
    found = contrast_diagnostics(first, second)
    views = [(i, view / view.norm()) for both in (first, second) for i, view in enumerate(both)]
    spread, hits, distances = [], 0, []
    for place, (i, view) in enumerate(views):
        others = [(float((view - other).square().sum()), j) for n, (j, other) in enumerate(views) if n != place]
        hits += min(others)[1] == i
        distances += [distance for distance, j in others if j == i]
        spread += [math.exp(-2 * distance) for distance, j in others if j != i]
    assert found["contrast_accuracy"].item() == pytest.approx(hits / len(views))
    assert found["alignment"].item() == pytest.approx(sum(distances) / len(distances))
    assert found["uniformity"].item() == pytest.approx(math.log(sum(spread) / len(spread)))


def test_nearest_views_by_hand() -> None:
    """0 and 10 degrees find each other, and 130 finds 90, which is nearer to 60; 180 and 60 do not find each other."""
    found = contrast_diagnostics(directions(0, 90, 180), 3 * directions(10, 130, 60))
    assert found["contrast_accuracy"].item() == pytest.approx(3 / 6)


def test_collapse_is_seen() -> None:
    same = torch.ones(4, 3)
    found = contrast_diagnostics(same, same)
    assert found["alignment"] == 0
    assert found["uniformity"].item() == pytest.approx(0, abs=1e-6)
    assert found["contrast_accuracy"] < 0.5


def test_four_directions_by_hand() -> None:
    """Two images at right angles, each with equal views: squared distance 2."""
    found = contrast_diagnostics(directions(0, 90), directions(0, 90))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {"contrast_accuracy": 1.0, "alignment": 0.0, "uniformity": -4.0}
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(ConfigurationError, match=f"`--model.temperature` to be above 0, but got {temperature}"):
        SimCLRTask(4, temperature=temperature)
