"""The loss of DAN: which estimator it uses, on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import toy_accuracy

from framework.datamodules import DomainPairDataModule
from framework.errors import ConfigurationError
from framework.functional import biased_mmd, linear_time_mmd, unbiased_mmd
from framework.modules import DAN
from framework.modules.adaptation.dan import MaximumMeanDiscrepancyLoss
from framework.networks import NetworkOutputs
from framework.trainer import Trainer


@pytest.mark.parametrize(
    ("name", "estimator"), [("biased", biased_mmd), ("unbiased", unbiased_mmd), ("linear_time", linear_time_mmd)]
)
def test_each_estimator_is_named_for_what_it_is(name: Any, estimator: Any) -> None:
    source = NetworkOutputs(torch.randn(8, 5), torch.randn(8, 3))
    target = NetworkOutputs(torch.randn(8, 5) + 1, torch.randn(8, 3))
    loss = MaximumMeanDiscrepancyLoss(name, (0.5, 1.0))
    value = loss(source, target, torch.tensor(0.0))
    assert torch.equal(value, estimator(source.features, target.features, scales=(0.5, 1.0)))
    assert torch.equal(loss.diagnostics["mmd"], value)


def test_minimising_it_brings_the_domains_together() -> None:
    source = torch.randn(64, 4)
    target = (torch.randn(64, 4) + 2).requires_grad_()
    loss = MaximumMeanDiscrepancyLoss()
    optimizer = torch.optim.Adam([target], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss(NetworkOutputs(source, source), NetworkOutputs(target, target), torch.tensor(0.0)).backward()
        optimizer.step()
    assert (target.mean(0) - source.mean(0)).abs().max() < 0.3


def test_linear_time_needs_a_single_source(domains: Path, images: Any, tmp_path: Path) -> None:
    """With several, neighbours in a batch are always of different folders: the estimate would be biased."""
    other = images(tmp_path / "other", ["ant", "bee", "cat"], count=5)
    folders = [str(domains / "source"), str(other)]
    options: dict[str, Any] = {"source": folders, "target": str(domains / "target"), "image_size": 16, "batch_size": 4}
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1, accelerator="cpu", **quiet)
    with pytest.raises(ConfigurationError, match=r"`--data\.source` .*linear_time.*unbiased"):
        trainer.fit(DAN(3, backbone="resnet8", estimator="linear_time"), DomainPairDataModule(**options, num_workers=0))
    trainer.fit(DAN(3, backbone="resnet8"), DomainPairDataModule(**options, num_workers=0))


def test_bad_values_name_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.estimator.*biased"):
        DAN(3, backbone="resnet8", estimator="quadratic")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"--model\.kernel_scales"):
        DAN(3, backbone="resnet8", kernel_scales=(1.0, -1.0))


@pytest.mark.parametrize("shift", ["noise", "rotation"])
def test_it_helps_on_a_toy(shift: str) -> None:
    source_only = [toy_accuracy(None, shift, seed=seed) for seed in range(3)]
    adapted = [toy_accuracy(MaximumMeanDiscrepancyLoss(), shift, seed=seed) for seed in range(3)]
    assert sum(source_only) / 3 < 0.93
    assert min(adapted) > 0.95
