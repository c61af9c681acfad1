"""StochNorm: which norms are stochastic, and when; what it refuses. The norm itself has tests of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transfer_contract as contract
from torch import nn

from framework.errors import ConfigurationError
from framework.modules import StochNorm, TransferClassifier
from framework.networks import StochasticNorm
from framework.trainer import Trainer

CASE = contract.Case("StochNorm", StochNorm, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any) -> Path:
    return contract.prepare(tmp_path_factory.mktemp("stoch_norm"), images)


@pytest.mark.parametrize("backbone", ["resnet8", "densenet121"])
def test_the_backbones_norms_alone(backbone: str) -> None:
    model = StochNorm(3, backbone=backbone, bottleneck_features=8)
    plain = TransferClassifier(3, backbone=backbone, bottleneck_features=8)
    count = sum(isinstance(part, nn.BatchNorm2d) for part in plain.backbone.modules())
    norms = [part for part in model.modules() if isinstance(part, StochasticNorm)]
    assert len(norms) == count > 0
    assert {norm.probability for norm in norms} == {0.5}
    assert all(norm.training for norm in norms)
    assert isinstance(model.bottleneck[1], nn.BatchNorm1d)
    plain.load_state_dict(model.state_dict())  # and a plain classifier takes its checkpoint
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_training_draws_and_evaluation_does_not(folder: Path) -> None:
    model = contract.build_model(CASE, folder, bottleneck_dropout=0.0)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


def test_probability_zero_is_plain_fine_tuning(folder: Path) -> None:
    plain = contract.Case("plain", TransferClassifier, {})
    first = contract.fit(CASE, folder, model={"probability": 0.0, "bottleneck_dropout": 0.0})
    second = contract.fit(plain, folder, model={"bottleneck_dropout": 0.0})
    third = contract.fit(CASE, folder, model={"bottleneck_dropout": 0.0})
    assert not contract.differing(contract.weights(first), contract.weights(second))
    assert contract.differing(contract.weights(first), contract.weights(third))


def test_frozen_stages_draw_nothing(folder: Path) -> None:
    model = contract.fit(CASE, folder, model={"policy": "lp_ft", "unfreeze_at": [0.9]}, max_steps=3)
    assert isinstance(model, StochNorm)
    loaded = torch.load(folder / "weights.pth", weights_only=True)
    assert torch.equal(model.backbone.bn1.running_mean, loaded["bn1.running_mean"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vit_b_16", "backbone_options": {"image_size": 32}}, r"--model\.backbone.*'vit_b_16'"),
        ({"backbone": "resnet8", "policy": "frozen"}, r"--model\.policy.*'frozen'.*'full'"),
        ({"backbone": "resnet8", "batch_norm": "source_statistics"}, r"--model\.batch_norm.*'source_statistics'"),
        ({"backbone": "resnet8", "probability": -0.1}, r"--model\.probability"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StochNorm(3, **options)


def test_synchronised_batch_norms_are_refused(folder: Path) -> None:
    """As Lightning puts them in the place of batch norms when a run on several GPUs starts."""
    model = contract.build_model(CASE, folder)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(ConfigurationError, match=r"--trainer\.sync_batchnorm false"):
        Trainer(**contract.QUIET, max_epochs=1).fit(model, contract.build_data(folder))
