"""Pretrained backbones on a new task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from framework import ImageFolderDataModule, ResidualClassifier, Trainer, TransferClassifier
from framework.errors import ConfigurationError

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
}


@pytest.fixture
def data(images: Callable[..., Path], tmp_path: Path) -> ImageFolderDataModule:
    images(tmp_path / "data", ["a", "b"], count=8)
    return ImageFolderDataModule(
        str(tmp_path / "data"), batch_size=4, steps_per_epoch=3, image_size=16, crop="pad", num_workers=0
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A backbone with statistics of its own, as training leaves them."""
    torch.manual_seed(7)
    backbone = ResidualClassifier(2, backbone="resnet8").backbone
    for name, value in backbone.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_()
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def unchanged(before: dict[str, Tensor], module: torch.nn.Module) -> list[str]:
    return [name for name, value in module.state_dict().items() if torch.equal(value, before[name])]


class Modes(L.Callback):
    """Whether each part is in training mode, batch after batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.seen.append((any(part.training for part in module.backbone.modules()), module.head.training))


@pytest.mark.parametrize("interval", [1.0, 1])
def test_frozen_leaves_the_backbone_as_it_is(data: ImageFolderDataModule, weights: Path, interval: Any) -> None:
    model = TransferClassifier(
        2, backbone="resnet8", weights=str(weights), policy="frozen", bottleneck_features=8, learning_rate=0.1
    )
    before, modes = state(model), Modes()
    loaded = torch.load(weights, weights_only=True)
    assert all(torch.equal(before[f"backbone.{name}"], value) for name, value in loaded.items())
    trainer = Trainer(callbacks=modes, val_check_interval=interval, **QUIET)  # with validation between the batches
    trainer.fit(model, data)
    same = unchanged(before, model)
    assert [name for name in before if name.startswith("backbone.")] == [n for n in same if n.startswith("backbone.")]
    assert not [name for name in same if name.startswith(("head.", "bottleneck."))]
    assert modes.seen == [(False, True)] * 6
    groups = trainer.optimizers[0].param_groups
    assert [group["name"] for group in groups] == ["bottleneck", "head"]
    optimized = {id(p) for group in groups for p in group["params"]}
    assert optimized == {id(p) for part in (model.bottleneck, model.head) for p in part.parameters()}
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.parameters())


def test_frozen_stays_so_whatever_is_called(weights: Path) -> None:
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), policy="frozen")
    for mode in (model.eval(), model.train(), model.train(False), model.train(True)):
        assert not any(part.training for part in mode.backbone.modules())
    assert model.head.training
    images = torch.randn(4, 3, 16, 16)
    model.train()
    training = model.backbone(images)
    model.eval()
    assert torch.equal(training, model.backbone(images))


def test_full_trains_everything(data: ImageFolderDataModule, weights: Path) -> None:
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), learning_rate=0.02, policy="full")
    before, modes = state(model), Modes()
    trainer = Trainer(callbacks=modes, **QUIET)
    trainer.fit(model, data)
    metrics = ("val_", "test_")
    assert [name for name in unchanged(before, model) if not name.startswith(metrics)] == []
    assert modes.seen == [(True, True)] * 6
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {"backbone": pytest.approx(0.002), "head": pytest.approx(0.02)}


def test_the_default_is_full(weights: Path) -> None:
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights))
    assert all(p.requires_grad for p in model.parameters())


def test_a_checkpoint_needs_the_weights_no_more(
    data: ImageFolderDataModule, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), policy="frozen", learning_rate=0.3)
    trainer = Trainer(**{**QUIET, "logger": True, "enable_checkpointing": True})
    trainer.fit(model, data)
    assert model.hparams["weights"] == str(weights)  # the run's own record keeps the name
    weights.unlink()
    path = Path(str(trainer.log_dir)) / "checkpoints" / "last.ckpt"
    for cls in (TransferClassifier, L.LightningModule):
        again = cls.load_from_checkpoint(path, weights_only=True)
        assert type(again) is TransferClassifier
        assert (again.policy, again.learning_rate) == ("frozen", 0.3)
        assert not any(p.requires_grad for p in again.backbone.parameters())
        assert len(unchanged(state(model), again)) == len(model.state_dict())
    other = TransferClassifier.load_from_checkpoint(path, weights_only=True, learning_rate=0.5)
    assert other.learning_rate == 0.5


def test_a_frozen_run_resumes_exactly(data: ImageFolderDataModule, weights: Path, tmp_path: Path) -> None:
    def build() -> TransferClassifier:
        torch.manual_seed(1)
        return TransferClassifier(2, backbone="resnet8", weights=str(weights), policy="frozen")

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    whole, rest = build(), build()
    Trainer(callbacks=Save(), **QUIET).fit(whole, data)
    Trainer(**QUIET).fit(rest, data, ckpt_path=tmp_path / "run.ckpt")
    assert len(unchanged(state(whole), rest)) == len(whole.state_dict())


def test_unknown_policy() -> None:
    with pytest.raises(ConfigurationError, match=r"`--model.policy` to be 'full' or 'frozen', but got 'half'"):
        TransferClassifier(2, backbone="resnet8", policy="half")  # type: ignore[arg-type]


def test_missing_weights() -> None:
    with pytest.raises(ConfigurationError, match=r"`--model.weights` to be an existing file"):
        TransferClassifier(2, backbone="resnet8", weights="none/there.pth")
