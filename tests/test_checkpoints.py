"""The checkpoints that every run writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from framework import ImageFolderDataModule, ResidualClassifier, Trainer
from framework.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from framework.errors import ConfigurationError


class Scripted(ResidualClassifier):
    """Logs the validation accuracies that it is told to."""

    script: tuple[float, ...] = (0.2, 0.9, 0.4, 0.9, 0.1, 0.3)

    def on_validation_epoch_end(self) -> None:
        self.log("val/scripted", self.script[self.current_epoch])


class Other(Scripted):
    monitor = ("val/scripted", "max")


class Lowest(Scripted):
    monitor = ("val/scripted", "min")


@pytest.fixture
def data(images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageFolderDataModule:
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "data", ["a", "b"], count=8)
    return ImageFolderDataModule(
        str(tmp_path / "data"), batch_size=2, steps_per_epoch=3, image_size=16, crop="none", num_workers=0
    )


def build(**options: Any) -> Trainer:
    return Trainer(**{"max_epochs": 4, "enable_progress_bar": False, "accelerator": "cpu", **options})


def model(cls: type[ResidualClassifier] = Other) -> ResidualClassifier:
    return cls(2, backbone="resnet8", schedule="cosine")


def load(trainer: L.Trainer | Path, name: str) -> dict[str, Any]:
    folder = trainer if isinstance(trainer, Path) else Path(str(trainer.log_dir)) / "checkpoints"
    loaded: dict[str, Any] = torch.load(folder / f"{name}.ckpt", weights_only=True)
    return loaded


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(plain(k) and plain(v) for k, v in value.items())
    if isinstance(value, list | tuple | set):
        return all(plain(item) for item in value)
    return value is None or type(value) in (int, float, bool, str, bytes) or isinstance(value, Tensor)


def test_best_and_last(data: ImageFolderDataModule) -> None:
    trainer, network = build(), model()
    trainer.fit(network, data)
    best, last = load(trainer, "best"), load(trainer, "last")
    assert (best["epoch"], best["global_step"]) == (1, 6)
    assert (last["epoch"], last["global_step"]) == (3, 12)
    assert all(torch.equal(value, last["state_dict"][name]) for name, value in network.state_dict().items())
    assert not torch.equal(best["state_dict"]["head.weight"], last["state_dict"]["head.weight"])
    for checkpoint in (best, last):
        assert plain(checkpoint)
    folder = Path(str(trainer.log_dir)) / "checkpoints"
    assert names(folder) == ["best.ckpt", "last.ckpt"]
    assert Path(trainer.checkpoint_callback.best_model_path).resolve() == folder.resolve() / "best.ckpt"  # type: ignore[union-attr]


@pytest.mark.parametrize(("cls", "epoch"), [(Other, 1), (Lowest, 0)])
def test_best_takes_the_modules_monitor(data: ImageFolderDataModule, cls: type[Scripted], epoch: int) -> None:
    trainer = build()
    trainer.fit(model(cls), data)
    assert load(trainer, "best")["epoch"] == epoch


def test_best_takes_a_monitor_that_is_given(data: ImageFolderDataModule) -> None:
    trainer = build(callbacks=BestCheckpoint("val/scripted", "min"))
    trainer.fit(model(Other), data)
    assert load(trainer, "best")["epoch"] == 0
    assert sum(isinstance(callback, BestCheckpoint) for callback in trainer.callbacks) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [("val/loss", None), (None, "min")])
def test_monitor_and_mode_go_together(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"`monitor` and `mode` .* to be given together"):
        BestCheckpoint(*arguments)


def test_a_mistyped_monitor_is_an_error(data: ImageFolderDataModule) -> None:
    with pytest.raises(L.utilities.exceptions.MisconfigurationException, match="could not find the monitored key"):
        build(callbacks=BestCheckpoint("val/scriptde", "max")).fit(model(), data)


def test_no_best_without_validation(data: ImageFolderDataModule) -> None:
    trainer = build(limit_val_batches=0, max_epochs=2)
    trainer.fit(model(), data)
    assert names(Path(str(trainer.log_dir)) / "checkpoints") == ["last.ckpt"]
    assert load(trainer, "last")["epoch"] == 1


@pytest.mark.parametrize(
    ("options", "epoch", "step"),
    [
        ({"check_val_every_n_epoch": 3, "max_epochs": 5}, 4, 15),
        ({"val_check_interval": 2, "max_epochs": 2}, 1, 6),
        ({"max_steps": 7, "max_epochs": -1}, 2, 7),
        ({"accumulate_grad_batches": 2, "max_epochs": 2}, 1, 4),
        ({"callbacks": EarlyStopping("val/scripted", mode="max", patience=1), "max_epochs": 6}, 2, 9),
        ({"callbacks": LastCheckpoint(every_n_epochs=2), "max_epochs": 3}, 2, 9),
        ({"callbacks": LastCheckpoint(every_n_train_steps=4), "max_epochs": 2}, 1, 6),
        ({"callbacks": LastCheckpoint(every_n_train_steps=4), "max_steps": 5, "max_epochs": -1}, 1, 5),
    ],
)
def test_last_is_the_end_of_the_run(
    data: ImageFolderDataModule, options: dict[str, Any], epoch: int, step: int
) -> None:
    trainer, network = build(**options), model()
    trainer.fit(network, data)
    last = load(trainer, "last")
    assert (last["epoch"], last["global_step"]) == (epoch, step)
    assert all(torch.equal(value, last["state_dict"][name]) for name, value in network.state_dict().items())


def test_last_is_written_every_epoch(data: ImageFolderDataModule) -> None:
    epochs = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.current_epoch:
                epochs.append(load(trainer, "last")["epoch"])

    build(callbacks=Watch(), check_val_every_n_epoch=2).fit(model(), data)
    assert epochs == [0, 1, 2]


def test_last_every_few_steps(data: ImageFolderDataModule) -> None:
    steps = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            steps.append(load(trainer, "last")["global_step"] if trainer.global_step >= 2 else 0)

    build(callbacks=[Watch(), LastCheckpoint(every_n_train_steps=2)], max_epochs=2).fit(model(), data)
    assert steps == [0, 0, 2, 2, 4, 4]


def test_a_checkpoint_of_the_users_own_stands_beside_them(data: ImageFolderDataModule) -> None:
    own = ModelCheckpoint(filename="own-{epoch}", save_top_k=-1)
    trainer = build(callbacks=[own])
    trainer.fit(model(), data)
    assert names(Path(str(trainer.log_dir)) / "checkpoints") == [
        "best.ckpt",
        "last.ckpt",
        *(f"own-epoch={i}.ckpt" for i in range(4)),
    ]
    assert load(trainer, "best")["epoch"] == 1


def test_a_resumed_run_keeps_the_best_score(data: ImageFolderDataModule) -> None:
    first = build(max_epochs=3)
    first.fit(model(), data)
    folder = Path(str(first.log_dir)) / "checkpoints"
    written = (folder / "best.ckpt").read_bytes()
    second = build(max_epochs=6, run=str(first.log_dir))
    second.fit(model(), data, ckpt_path=folder / "last.ckpt")
    assert load(folder, "last")["epoch"] == 5
    assert (folder / "best.ckpt").read_bytes() == written  # nothing later was better than epoch 1
    (best,) = (callback for callback in second.callbacks if isinstance(callback, BestCheckpoint))  # type: ignore[attr-defined]
    assert best.best_model_score == pytest.approx(0.9)


@pytest.mark.parametrize("every", [None, 4])
def test_the_last_of_a_finished_run_can_be_trained_on(data: ImageFolderDataModule, every: int | None) -> None:
    """Two epochs and two more are the same as four: a constant rate, since the cosine depends on the length."""
    options = {"callbacks": LastCheckpoint(every_n_train_steps=every)} if every else {}

    def constant() -> ResidualClassifier:
        torch.manual_seed(0)
        return Other(2, backbone="resnet8")

    whole = constant()
    build(max_epochs=4, logger=False, enable_checkpointing=False).fit(whole, data)
    first = build(max_epochs=2, **options)
    first.fit(constant(), data)
    rest = constant()
    second = build(max_epochs=4, run=str(first.log_dir))
    second.fit(rest, data, ckpt_path=Path(str(first.log_dir)) / "checkpoints" / "last.ckpt")
    assert second.global_step == 12
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())


def test_nothing_is_saved_after_an_error(data: ImageFolderDataModule) -> None:
    class Broken(Other):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise KeyError("broken")
            return super().training_step(batch, batch_idx)

    trainer = build()
    with pytest.raises(KeyError):
        trainer.fit(model(Broken), data)
    assert not list(Path(str(trainer.log_dir)).rglob("*.ckpt"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def full(checkpoint: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert names(path.parent) == ["last.ckpt"]


def test_a_write_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and on the disk before the name changes."""
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    events: list[Any] = []
    fsync, replace = os.fsync, Path.replace

    def record_replace(self: Path, target: Path) -> Path:
        assert self.parent == tmp_path  # the same file system
        events.append((torch.load(self, weights_only=True), torch.load(target, weights_only=True)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda number: (events.append("fsync"), fsync(number)))
    monkeypatch.setattr(Path, "replace", record_replace)
    io.save_checkpoint({"step": 2}, path)
    assert events == ["fsync", ({"step": 2}, {"step": 1})]
    assert torch.load(path, weights_only=True) == {"step": 2}
