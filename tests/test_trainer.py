"""The Trainer's defaults, and what can be switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.profilers import SimpleProfiler

from framework import ImageFolderDataModule, ResidualClassifier, Trainer
from framework.callbacks import ConfusionMatrix, FinalMetrics, PredictionWriter, SampleImages
from framework.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from framework.errors import ConfigurationError
from framework.trainer import STEP_HOOKS, NoProfiler

DEFAULTS = {SampleImages, FinalMetrics, ConfusionMatrix, PredictionWriter, BestCheckpoint, LastCheckpoint}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(**options: Any) -> Trainer:
    return Trainer(**{"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu", **options})


def kinds(trainer: Trainer) -> set[type]:
    return {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]


@pytest.fixture
def data(domains: Path) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(domains / "source"), batch_size=4, steps_per_epoch=2, image_size=16, num_workers=0)


def everything(trainer: Trainer, data: ImageFolderDataModule) -> None:
    model = ResidualClassifier(3, backbone="resnet8")
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data)


def test_defaults(data: ImageFolderDataModule) -> None:
    trainer = build(experiment="a/b")
    assert kinds(trainer) >= DEFAULTS
    everything(trainer, data)
    run = Path("lightning_logs/a/b/version_0")
    assert Path(str(trainer.log_dir)) == run
    written = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert written == {
        "checkpoints",
        "confusion_matrix.csv",
        "final",
        "hparams.yaml",
        "metrics.csv",
        "predictions.csv",
        "split.csv",
    }
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_another_root(folder: Path) -> None:
    assert Path(str(build(default_root_dir="elsewhere").log_dir)) == Path("elsewhere/lightning_logs/default/version_0")


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"logger": False, "enable_checkpointing": False}])
def test_a_run_that_writes_nothing(data: ImageFolderDataModule, folder: Path, options: dict[str, Any]) -> None:
    everything(build(**options), data)
    assert list(folder.iterdir()) == []


def test_barebones(data: ImageFolderDataModule, folder: Path) -> None:
    trainer = Trainer(barebones=True, max_epochs=1, accelerator="cpu")
    trainer.fit(ResidualClassifier(3, backbone="resnet8"), data)
    assert trainer.global_step == 2
    assert list(folder.iterdir()) == []


def test_checkpoints_without_a_logger(data: ImageFolderDataModule, folder: Path) -> None:
    build(logger=False).fit(ResidualClassifier(3, backbone="resnet8"), data)
    assert sorted(path.name for path in folder.rglob("*.*")) == ["best.ckpt", "last.ckpt"]


def test_no_checkpoints(data: ImageFolderDataModule) -> None:
    trainer = build(enable_checkpointing=False)
    assert not kinds(trainer) & {BestCheckpoint, LastCheckpoint}
    trainer.fit(ResidualClassifier(3, backbone="resnet8"), data)
    assert not (Path(str(trainer.log_dir)) / "checkpoints").exists()


def test_progress_bar() -> None:
    assert TQDMProgressBar not in kinds(build())
    bars = [c for c in build(enable_progress_bar=None).callbacks if isinstance(c, TQDMProgressBar)]  # type: ignore[attr-defined]
    assert [bar.refresh_rate for bar in bars] == [10]
    own = TQDMProgressBar(refresh_rate=3)
    bars = [c for c in build(enable_progress_bar=True, callbacks=own).callbacks if isinstance(c, TQDMProgressBar)]  # type: ignore[attr-defined]
    assert bars == [own]


def test_callbacks_of_the_users_own_replace_the_defaults() -> None:
    own = SampleImages(most=1)
    trainer = build(callbacks=[own])
    assert [c for c in trainer.callbacks if isinstance(c, SampleImages)] == [own]  # type: ignore[attr-defined]
    assert kinds(trainer) >= DEFAULTS


def test_loggers_of_the_users_own(data: ImageFolderDataModule, folder: Path) -> None:
    everything(build(logger=CSVLogger(folder / "mine")), data)
    assert (folder / "mine" / "lightning_logs" / "version_0" / "predictions.csv").is_file()
    assert not (folder / "lightning_logs").exists()
    everything(build(logger=TensorBoardLogger(folder / "board")), data)
    assert (folder / "board" / "lightning_logs" / "version_0" / "final").is_dir()


def test_plugins_of_the_users_own() -> None:
    own = TorchCheckpointIO()
    assert build(plugins=own).strategy.checkpoint_io is own
    assert build(plugins=[own]).strategy.checkpoint_io is own


def test_continuing_a_run(data: ImageFolderDataModule, folder: Path) -> None:
    first = build(experiment="x/y")
    everything(first, data)
    second = build(run="lightning_logs/x/y/version_0/")
    assert Path(str(second.log_dir)) == folder / "lightning_logs/x/y/version_0"
    assert build(experiment="x/y").logger.version == 1  # type: ignore[union-attr]
    with pytest.raises(ConfigurationError, match=r"`--trainer.run` to be the folder of a run, but 'none' is none"):
        build(run="none")


class Recorder(Callback):
    """Defines every hook of a step but one."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def _record(self, name: str) -> None:
        self.called.append(name)

    def on_train_batch_start(self, *_: Any) -> None:
        self._record("on_train_batch_start")

    def on_before_zero_grad(self, *_: Any) -> None:
        self._record("on_before_zero_grad")

    def on_before_backward(self, *_: Any) -> None:
        self._record("on_before_backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._record("on_before_optimizer_step")

    def on_train_batch_end(self, *_: Any) -> None:
        self._record("on_train_batch_end")


class Derived(Recorder):
    """Inherits hooks, and defines the last of them."""

    def on_after_backward(self, *_: Any) -> None:
        self._record("on_after_backward")


def test_hooks_that_a_callback_defines_are_called_and_the_others_passed_over(data: ImageFolderDataModule) -> None:
    first, second, late = Recorder(), Derived(), Callback()
    calls: list[str] = []
    late.on_after_backward = lambda *_: calls.append("late")  # type: ignore[method-assign]
    trainer = build(callbacks=[first, second, late])
    trainer.fit(ResidualClassifier(3, backbone="resnet8"), data)
    assert set(STEP_HOOKS) == set(second.called)
    assert set(STEP_HOOKS) - set(first.called) == {"on_after_backward"}
    assert all(second.called.count(name) == 2 for name in STEP_HOOKS)  # batches
    assert calls == ["late", "late"]
    assert first.on_after_backward is None
    assert callable(Callback().on_after_backward)  # of these callbacks alone
    idle = [c for c in trainer.callbacks if type(c) in DEFAULTS and c.on_before_backward is not None]  # type: ignore[attr-defined]
    assert not idle


def test_nothing_is_profiled_unless_asked_for(data: ImageFolderDataModule) -> None:
    trainer = build(logger=False, enable_checkpointing=False)
    assert type(trainer.profiler) is NoProfiler
    trainer.fit(ResidualClassifier(3, backbone="resnet8"), data)
    own = SimpleProfiler()
    trainer = build(logger=False, enable_checkpointing=False, profiler=own)
    trainer.fit(ResidualClassifier(3, backbone="resnet8"), data)
    assert trainer.profiler is own
    assert len(own.recorded_durations["run_training_batch"]) == 2
    assert type(build(profiler="simple", logger=False).profiler) is SimpleProfiler


class Hooks(Callback):
    """Looks at what Lightning notes as the hook that runs, which ``log`` goes by."""

    def __init__(self) -> None:
        self.noted: list[str | None] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.noted.append(pl_module._current_fx_name)


def test_the_hook_that_runs_is_noted(data: ImageFolderDataModule) -> None:
    hooks, model = Hooks(), ResidualClassifier(3, backbone="resnet8")
    build(callbacks=hooks, logger=False, enable_checkpointing=False).fit(model, data)
    assert hooks.noted == ["on_train_batch_end"] * 2
    assert model._current_fx_name is None
    model.head = torch.nn.Linear(model.num_features, 3)  # parts and parameters go where torch wants them
    model.scale = torch.nn.Parameter(torch.ones(1))
    assert "head" in dict(model.named_children())
    assert "scale" in dict(model.named_parameters())
