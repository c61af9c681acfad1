"""``--model.channels_last``: what it is by default, and that it changes no result of any kind of module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import pretraining_contract
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from framework import DANN, MCD, AlignmentSum, ResidualClassifier, SimCLR, SourceOnly, TransferClassifier
from framework.modules.backbone_module import BackboneModule


def is_channels_last(module: BackboneModule) -> bool:
    weights = [p for p in module.backbone.parameters() if p.dim() == 4 and min(p.shape) > 1]
    layouts = {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights}
    assert len(layouts) == 1
    return layouts.pop()


@pytest.mark.parametrize(
    ("backbone", "channels_last", "expected"),
    [
        ("resnet8", None, True),
        ("resnet8", True, True),
        ("resnet8", False, False),
        ("timm/test_vit", None, False),
        ("timm/test_vit", True, True),
        ("timm/test_resnet", None, True),
    ],
)
def test_default_and_force(backbone: str, channels_last: bool | None, expected: bool) -> None:
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    assert is_channels_last(ResidualClassifier(2, backbone=backbone, channels_last=channels_last)) is expected


def close(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.allclose(value.double(), two[key].double(), rtol=1e-7, atol=1e-9) for key, value in one.items())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (DANN, {}),
        (DANN, {"batch_norm": "domain_specific"}),
        (MCD, {"batch_norm": "domain_specific"}),
        (AlignmentSum, {"batch_norm": "domain_specific", "terms": {"rotation": 1.0, "mcc": 1.0}}),
        (SourceOnly, {"compile": True}),
    ],
    ids=["dann", "specific", "mcd", "self-supervision", "compiled"],
)
def test_training_changes_by_rounding_only(
    method: Any, options: dict[str, Any], domains: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="aot_eager"))
    found = [
        contract.weights(
            contract.fit(method, domains, model={**options, "channels_last": value}, precision="64-true", max_epochs=1)
        )
        for value in (None, False)
    ]
    assert close(*found)
    untrained = contract.weights(contract.build_model(method, **options))
    assert not close(found[0], untrained)


def test_pretraining_changes_by_rounding_only(tmp_path: Path, images: Any) -> None:
    root = pretraining_contract.prepare(tmp_path, images)
    found = []
    for value in (None, False):
        module = pretraining_contract.fit(SimCLR, root, model={"channels_last": value}, precision="64-true")
        assert is_channels_last(module) is (value is None)
        found.append(contract.weights(module))
    assert close(*found)


@pytest.mark.parametrize("written", [False, True, "missing"])
def test_checkpoints_of_other_settings(written: Any, domains: Path, tmp_path: Path) -> None:
    """Older ones say false, or nothing; they predict the same, give a start, and go on."""
    path = tmp_path / "older.ckpt"
    setting = {} if written == "missing" else {"channels_last": written}
    model = {"channels_last": False} | setting
    module = contract.fit(SourceOnly, domains, save=(7, path), model=model, precision="64-true")
    if written == "missing":
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["hyper_parameters"]["channels_last"]
        torch.save(checkpoint, path)
    images = torch.randn(5, 3, 16, 16)
    loaded = LightningModule.load_from_checkpoint(path, weights_only=True).eval()
    assert isinstance(loaded, SourceOnly)
    assert is_channels_last(loaded) is (written is not False)
    reference = SourceOnly(**{**loaded.hparams, "channels_last": False})
    state = torch.load(path, weights_only=True)["state_dict"]
    reference.load_state_dict(state)
    torch.testing.assert_close(loaded(images), reference.eval()(images), rtol=1e-4, atol=1e-5)
    start = TransferClassifier(3, backbone="resnet8", bottleneck_features=16, init_from=str(path))
    assert is_channels_last(start)
    assert all(
        torch.equal(value, state[f"backbone.{key}"].to(value.dtype))
        for key, value in start.backbone.state_dict().items()
    )
    # resumed under the new default: momentum of the other layout
    resumed = contract.fit(SourceOnly, domains, resume=path, precision="64-true")
    assert is_channels_last(resumed)
    for key, value in contract.weights(resumed).items():
        torch.testing.assert_close(value, contract.weights(module)[key], rtol=1e-9, atol=1e-11)
