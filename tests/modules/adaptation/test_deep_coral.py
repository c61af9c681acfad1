"""The loss of DeepCORAL: what it aligns, and that it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import build_data, toy_accuracy

from framework.errors import ConfigurationError
from framework.functional import coral
from framework.modules import DeepCORAL
from framework.modules.adaptation.deep_coral import CorrelationAlignmentLoss
from framework.networks import NetworkOutputs
from framework.trainer import Trainer

NOW = torch.tensor(0.5)


def outputs(count: int, scale: float = 1.0) -> NetworkOutputs:
    return NetworkOutputs(scale * torch.randn(count, 6), scale * torch.randn(count, 3))


def test_the_papers_layer_is_the_last_one() -> None:
    source, target = outputs(8), outputs(5, 2.0)
    loss = CorrelationAlignmentLoss()
    assert torch.equal(loss(source, target, NOW), coral(source.logits, target.logits))
    loss = CorrelationAlignmentLoss("features", mean_weight=0.5)
    assert torch.equal(loss(source, target, NOW), coral(source.features, target.features, mean_weight=0.5))


def test_minimising_it_gives_the_target_the_sources_covariance() -> None:
    source = torch.randn(64, 4) @ torch.randn(4, 4)
    target = torch.randn(64, 4).requires_grad_()
    loss = CorrelationAlignmentLoss()
    optimizer = torch.optim.Adam([target], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(NetworkOutputs(source, source), NetworkOutputs(target, target), NOW).backward()
        optimizer.step()
    torch.testing.assert_close(target.detach().T.cov(), source.T.cov(), rtol=0.02, atol=0.02)
    assert float(loss.diagnostics["variance_ratio"]) == pytest.approx(1, abs=0.02)


def test_complains_of_scales_that_stay_apart() -> None:
    loss = CorrelationAlignmentLoss()
    assert not list(loss.complaints({"train/variance_ratio": 9.0}, 0.2))
    assert not list(loss.complaints({"train/variance_ratio": 0.5}, 0.9))
    for ratio in (0.1, 9.0):
        ((_, sentence),) = loss.complaints({"train/variance_ratio": ratio}, 0.9)
        assert f"{ratio:.2g} times" in sentence
        assert "--model.trade_off" in sentence
    loss(outputs(50), outputs(50, 3.0), NOW)
    assert float(loss.diagnostics["variance_ratio"]) == pytest.approx(9, rel=0.5)


def test_bad_values_name_the_flag(domains: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.layer.*'logits' or 'features'"):
        DeepCORAL(3, backbone="resnet8", layer="fc8")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"--model\.mean_weight"):
        DeepCORAL(3, backbone="resnet8", mean_weight=-1.0)
    module = DeepCORAL(3, backbone="resnet8", bottleneck_normalization="none")
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"at least 2 images of each domain .*`--data\.target_batch_size` 1"):
        trainer.fit(module, build_data(domains, target_batch_size=1))


@pytest.mark.parametrize(("layer", "trade_off"), [("logits", 1.0), ("features", 10.0)])
def test_it_helps_on_a_toy(layer: Any, trade_off: float) -> None:
    source_only = [toy_accuracy(None, "rotation", seed=seed) for seed in range(3)]
    adapted = [toy_accuracy(CorrelationAlignmentLoss(layer), "rotation", trade_off, seed) for seed in range(3)]
    assert sum(source_only) / 3 < 0.93
    assert min(adapted) > 0.95
