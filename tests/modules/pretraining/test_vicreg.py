"""VICReg: the weighted sum, and that the diagnostics show a collapse and what prevents it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.functional import vicreg_terms
from framework.modules.pretraining.vicreg import VICRegTask


def make(**options: Any) -> VICRegTask:
    return VICRegTask(6, **{"projection_features": 4, "projection_normalization": "none", **options})


def pairs(images: int = 8) -> Tensor:
    """Two similar views of each image, ``[N, 2, 3, 1, 2]``."""
    first = torch.randn(images, 3, 1, 2)
    return torch.stack([first, first + 0.2 * torch.randn(images, 3, 1, 2)], dim=1)


def test_the_loss_is_the_weighted_sum() -> None:
    task, images = make(invariance_weight=3.0, variance_weight=5.0, covariance_weight=7.0), pairs()
    first, second = (task.projector(images[:, view].flatten(1)) for view in (0, 1))
    terms = vicreg_terms(first, second)
    torch.testing.assert_close(task(nn.Flatten(), images), 3 * terms[0] + 5 * terms[1] + 7 * terms[2])
    found = task.diagnostics
    torch.testing.assert_close(found["invariance"], terms[0].detach())
    torch.testing.assert_close(found["variance"], terms[1].detach())
    torch.testing.assert_close(found["covariance"], terms[2].detach())
    torch.testing.assert_close(found["embedding_std"], ((first.std(0) + second.std(0)) / 2).mean().detach())


def test_the_defaults_are_the_papers() -> None:
    assert VICRegTask(6, projection_features=4).weights == (25.0, 25.0, 1.0)


@pytest.mark.parametrize(("variance_weight", "expected"), [(0.0, (0.0, 0.01)), (25.0, (0.8, 1.5))])
def test_variance_prevents_collapse(variance_weight: float, expected: tuple[float, float]) -> None:
    task, images = make(variance_weight=variance_weight, projection_layers=1), pairs(32)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.02)
    task(nn.Flatten(), images)
    assert task.diagnostics["embedding_std"] > 0.1
    for _ in range(200):
        optimizer.zero_grad()
        task(nn.Flatten(), images).backward()
        optimizer.step()
    low, high = expected
    assert low <= float(task.diagnostics["embedding_std"]) <= high


@pytest.mark.parametrize("name", ["invariance_weight", "variance_weight", "covariance_weight"])
def test_bad_weights(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"`--model.{name}` to be 0 or more, but got -1.0"):
        make(**{name: -1.0})
