"""The moving average of the weights: its value, what is validated, kept, tested and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from fusion_runs import QUIET, build_data, load, same, train
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from framework import Distillation, Trainer, TransferClassifier
from framework.__main__ import main
from framework.callbacks import ExponentialMovingAverage
from framework.errors import ConfigurationError


@pytest.fixture
def root(images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return images(tmp_path / "data", ["ant", "bee"], count=10)


def build(**options: Any) -> TransferClassifier:
    torch.manual_seed(0)
    return TransferClassifier(2, backbone="resnet8", **{"learning_rate": 0.1, **options})


class Record(L.Callback):
    """The weights after each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        pass

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append({name: value.clone() for name, value in module.state_dict().items()})

    def on_validation_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.validated.append({name: value.clone() for name, value in module.state_dict().items()})


PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize(
    ("accumulate", "precision"), [(1, "32-true"), (2, "32-true"), (1, "bf16-true"), (1, "64-true")]
)
def test_the_average_is_what_is_validated_kept_and_tested(root: Path, accumulate: int, precision: str) -> None:
    """Weights of bfloat16 have an average of float32: theirs would round its small steps away."""
    model, record, decay = build(), Record(), 0.8
    callbacks = [record, ExponentialMovingAverage(decay)]
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "precision": precision}
    trainer = Trainer(**{**QUIET, **options, "callbacks": callbacks})
    trainer.fit(model, build_data(root, steps_per_epoch=4))
    expected = record.steps[0]
    for step in record.steps[1:]:
        expected = {
            name: decay * expected[name].double() + (1 - decay) * value.double() if value.is_floating_point() else value
            for name, value in step.items()
        }
    assert len(record.steps) == 8 // accumulate
    folder = Path(str(trainer.log_dir)) / "checkpoints"
    last, used = load(folder / "last.ckpt"), PRECISIONS[precision]
    for weights in (last["state_dict"], dict(model.state_dict()), record.validated[-1]):
        rounding = 1e-2 if weights is not last["state_dict"] and used == torch.bfloat16 else 1e-5
        for name, value in weights.items():
            torch.testing.assert_close(value.double(), expected[name].double(), rtol=rounding, atol=rounding / 10)
    assert {value.dtype for value in last["current_model_state"].values() if value.is_floating_point()} == {used}
    assert last["state_dict"]["head.weight"].dtype == (torch.float32 if used == torch.bfloat16 else used)
    assert same(last["current_model_state"], record.steps[-1])
    assert not same(last["current_model_state"], last["state_dict"])
    again = L.LightningModule.load_from_checkpoint(folder / "last.ckpt", weights_only=True)
    expected = {
        name: value.float() if value.is_floating_point() else value for name, value in last["state_dict"].items()
    }
    assert same(dict(again.state_dict()), expected)


class SaveAt(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint("run.ckpt")


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
@pytest.mark.parametrize(
    ("teacher", "precision"),
    [
        (None, "32-true"),
        ("here", "32-true"),
        ("gone", "32-true"),
        (None, "bf16-true"),
        (None, "64-true"),
        ("gone", "64-true"),
    ],
)
def test_a_run_resumes_exactly(root: Path, teacher: str | None, precision: str) -> None:
    path = train(root, seed=3) if teacher else None

    def made() -> TransferClassifier:
        torch.manual_seed(0)
        return Distillation(2, backbone="resnet8", teachers=[str(path)], learning_rate=0.1) if path else build()

    def trainer(*more: L.Callback) -> Trainer:
        callbacks = [ExponentialMovingAverage(0.8), *more]
        options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "precision": precision}
        return Trainer(**QUIET | options, callbacks=callbacks)

    whole, rest = made(), None
    trainer(SaveAt()).fit(whole, build_data(root, seed=0))
    if teacher == "gone" and path is not None:
        path.unlink()
    rest = made()
    trainer().fit(rest, build_data(root, seed=0), ckpt_path="run.ckpt")
    assert same(dict(whole.state_dict()), dict(rest.state_dict()))


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_frozen_weights_stay_as_they_are(root: Path) -> None:
    """Lightning's own average of equal numbers is off by rounding."""
    kept = {}
    for callback in (ExponentialMovingAverage(0.9), EMAWeightAveraging(decay=0.9)):
        model = build(policy="frozen")
        before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
        trainer = Trainer(**QUIET | {"logger": False, "enable_checkpointing": False}, callbacks=[callback])
        trainer.fit(model, build_data(root))
        kept[type(callback).__name__] = same(dict(model.backbone.state_dict()), before)
    assert kept == {"ExponentialMovingAverage": True, "EMAWeightAveraging": False}


class WithTable(TransferClassifier):
    """A network with a table of indices, as a Swin transformer has."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("table", torch.arange(3000))


def test_integers_stay_whole(root: Path) -> None:
    for decay in (0.9, 0.9999):
        model = WithTable(2, backbone="resnet8")
        options = QUIET | {"logger": False, "enable_checkpointing": False}
        Trainer(**options, callbacks=[ExponentialMovingAverage(decay)]).fit(model, build_data(root))
        assert torch.equal(model.table, torch.arange(3000))  # type: ignore[arg-type]


def test_buffers_may_be_the_current_ones(root: Path) -> None:
    model, record = build(), Record()
    options = QUIET | {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    callbacks = [record, ExponentialMovingAverage(0.9, use_buffers=False)]
    Trainer(**options, callbacks=callbacks).fit(model, build_data(root))
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.running_mean, record.steps[-1][f"backbone.{name}.running_mean"])  # type: ignore[arg-type]
            assert not torch.equal(module.weight, record.steps[-1][f"backbone.{name}.weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay(decay: float) -> None:
    with pytest.raises(ConfigurationError, match=r"`decay` of ExponentialMovingAverage to be in \[0, 1\)"):
        ExponentialMovingAverage(decay)


@pytest.mark.filterwarnings("error:.*configure_model")
def test_the_command_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        f"fit --model TransferClassifier --model.backbone resnet8 --data ImageFolderDataModule --data.root {root} "
    )
    arguments += (
        "--data.image_size 16 --data.crop none --data.batch_size 4 --data.num_workers 0 --trainer.accelerator cpu "
    )
    arguments += "--trainer.enable_progress_bar false --trainer.max_epochs 1 --model.learning_rate 0.1 "
    arguments += "--trainer.callbacks+=ExponentialMovingAverage --trainer.callbacks.decay 0.5"
    assert main(arguments.split()) == 0
    run = "lightning_logs/default/version_0"
    for name in ("best", "last"):
        checkpoint = load(f"{run}/checkpoints/{name}.ckpt")
        assert not same(checkpoint["state_dict"], checkpoint["current_model_state"])
    assert main(["fit", "--run", run, "--trainer.max_epochs", "2"]) == 0
    assert main(["test", "--run", run]) == 0
    capsys.readouterr()
    late = arguments.replace("callbacks.decay 0.5", "callbacks.update_starting_at_step 5")
    assert main(late.split()) == 2
    assert "update_starting_at_step" in capsys.readouterr().err
