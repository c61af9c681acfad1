"""The online probe: right values, at the right time, in the right places, and no trace in the training."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import online_probe_ddp_job as job
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from online_probe_ddp_job import NAMES, expected_values, pretraining
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from framework import ImageFolderDataModule, ResidualClassifier, RotationPrediction, SourceOnly, Trainer
from framework.__main__ import main
from framework.batch import UnlabelledBatch
from framework.callbacks import ExponentialMovingAverage, OnlineProbe
from framework.checkpoints import BestCheckpoint
from framework.datamodules import DomainPairDataModule, UnlabelledFolderDataModule
from framework.errors import ConfigurationError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes that are hard to tell, of 12 training and 8 validation images; those of test cannot be read."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "labelled"
    for part, count in (("train", 12), ("val", 8), ("test", 2)):
        vague_images(folder / part, count)
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(b"not to be looked at")
    return folder


def vague_images(folder: Path, count: int, first: int = 0, classes: str = "abc") -> None:
    """Noise whose brightness and contrast are near those of the class."""
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            generator = np.random.default_rng([len(folder.name), index, i])
            brightness, contrast = generator.normal(70 + 25 * index, 14), abs(generator.normal(10 + 12 * index, 8))
            pixels = brightness + contrast * generator.normal(size=(16, 16, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture
def data(domains: Path) -> Callable[..., UnlabelledFolderDataModule]:
    return lambda **options: job.unlabelled(domains / "target", **options)


def trainer(*callbacks: L.Callback, **options: Any) -> Trainer:
    defaults = {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu", "logger": False}
    return Trainer(**{**defaults, "enable_checkpointing": False, "callbacks": list(callbacks), **options})


def rows(run: Trainer, name: str) -> dict[int, float]:
    with (Path(str(run.log_dir)) / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["name"] == name}


def logged(run: Trainer, prefix: str = "val/") -> dict[str, float]:
    return {name: float(run.callback_metrics[f"{prefix}{name}"]) for name in NAMES}


# ---------------------------------------------------------------------- values
def test_a_pretraining_module(root: Path, data: Callable[..., Any]) -> None:
    run, module = trainer(OnlineProbe(str(root), neighbours=30), logger=None), pretraining()
    run.fit(module, data())
    values = expected_values(module, root, 30)
    assert logged(run) == pytest.approx(values)
    assert all(0.4 < value < 0.95 for value in values.values())  # not all or none are right
    board, final = EventAccumulator(str(run.log_dir)).Reload(), EventAccumulator(f"{run.log_dir}/final").Reload()
    for name, value in values.items():
        assert [event.value for event in board.Scalars(f"val/{name}")] == [pytest.approx(value)]
        assert [event.value for event in final.Scalars(f"final/val/{name}")] == [pytest.approx(value)]
        assert list(rows(run, f"val/{name}").values()) == [pytest.approx(value)]


def test_a_classifier(root: Path, tmp_path: Path, images: Callable[..., Path]) -> None:
    """Its bottleneck's features; the probe's classes need not be the run's."""
    options: dict[str, Any] = {"image_size": 16, "crop": "none", "num_workers": 0, "batch_size": 4}
    run, module = trainer(OnlineProbe(str(root))), ResidualClassifier(5, backbone="resnet8", bottleneck_features=8)
    images(tmp_path / "five", list("abcde"), count=6)
    run.fit(module, ImageFolderDataModule(str(tmp_path / "five"), **options))
    assert logged(run) == pytest.approx(expected_values(module, root, 20, lambda x: module.outputs(x).features))


def test_domain_adaptation(root: Path, domains: Path) -> None:
    """Two validation loaders: each image of the folder is looked at once."""
    run, module = trainer(OnlineProbe(str(root))), SourceOnly(3, backbone="resnet8", bottleneck_features=8)
    folders = str(domains / "source"), str(domains / "target")
    counts: list[int] = []
    encode = module.outputs
    module.outputs = lambda images: counts.append(len(images)) or encode(images)  # type: ignore
    run.fit(module, DomainPairDataModule(*folders, batch_size=4, image_size=16, crop="none", num_workers=0))
    looked_at = [8, 8, 8, 8, 4, 8, 8, 8]  # 36 images and 24
    assert [counts[i : i + 8] == looked_at for i in range(len(counts))].count(True) == 1
    assert logged(run) == pytest.approx(expected_values(module, root, 20, lambda x: module.outputs(x).features))


def test_the_runs_own_pixels(root: Path, data: Callable[..., Any]) -> None:
    run, module, seen = trainer(OnlineProbe(str(root))), pretraining(), []
    module.backbone.register_forward_hook(lambda _, images, features: seen.append(images[0]))
    pixels = {"image_size": 24, "resize_size": 40, "crop": "center", "mean": (0.1, 0.2, 0.3), "std": (0.9, 0.5, 0.2)}
    run.fit(module, data(eval_batch_size=36, **pixels))
    last = seen[-2:]
    assert logged(run) == pytest.approx(expected_values(module, root, 20, **pixels))
    folder = ImageFolderDataModule(str(root), eval_batch_size=36, check_images=False, num_workers=0, **pixels)
    folder.setup("fit")
    (bank,), (evaluated,) = folder.unaugmented_train_dataloader(), folder.val_dataloader()
    for part, images in ((bank.images, last[0]), (evaluated.images, last[1])):
        torch.testing.assert_close(folder.normalize(part), images)


class Pictures(Dataset[UnlabelledBatch]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> UnlabelledBatch:
        return UnlabelledBatch(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)))


def test_loaders_of_the_users_own(root: Path) -> None:
    run, module = trainer(OnlineProbe(str(root))), pretraining()
    run.fit(module, DataLoader(Pictures(), batch_size=4), DataLoader(Pictures(), batch_size=4))
    image_size, mean, std = module.preprocessing  # what the backbone expects
    pixels = {"image_size": image_size, "crop": "random_resized", "mean": mean, "std": std}
    assert logged(run) == pytest.approx(expected_values(module, root, 20, **pixels))


def test_few_labels(root: Path, data: Callable[..., Any]) -> None:
    run, module = trainer(OnlineProbe(str(root), labels_per_class=1, neighbours=1)), pretraining()
    run.fit(module, data(seed=3))
    assert logged(run) == pytest.approx(expected_values(module, root, 1, labels_per_class=1, seed=3))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(root: Path, data: Callable[..., Any], precision: Any) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    # the images are tried before the precision is set up
    begin = LambdaCallback(on_fit_start=lambda *_: seen.clear())
    run, module = trainer(OnlineProbe(str(root)), begin, precision=precision), pretraining()
    module.backbone.register_forward_hook(lambda _, images, features: seen.append((images[0].dtype, features.dtype)))
    run.fit(module, data())
    dtype = torch.float64 if precision == "64-true" else torch.bfloat16
    assert {features for _, features in seen} == {dtype}
    assert {images for images, _ in seen} == {torch.float32 if precision == "bf16-mixed" else dtype}
    assert all(0 <= value <= 1 for value in logged(run).values())


@pytest.mark.parametrize("first", [True, False])
def test_an_average_of_the_weights(root: Path, data: Callable[..., Any], first: bool) -> None:
    """What validation runs with is what is probed, in whichever order the callbacks come."""
    callbacks: list[L.Callback] = [ExponentialMovingAverage(0.9), OnlineProbe(str(root), neighbours=1)]
    run, module = trainer(*(callbacks if first else callbacks[::-1]), max_epochs=2), pretraining()
    probed: list[Tensor] = []
    module.backbone.register_forward_hook(lambda _, images, features: probed.append(features.sum()))
    run.fit(module, data())
    assert logged(run) == pytest.approx(expected_values(module, root, 1))  # the average is what a run ends with
    loader = callbacks[1]._loader(callbacks[1]._files["bank"])  # type: ignore[attr-defined]
    pixels = callbacks[1]._pixels.normalize(next(iter(loader)).images)  # type: ignore[attr-defined]
    with torch.no_grad():
        assert any(torch.equal(total, module.eval()(pixels).sum()) for total in probed)


# ---------------------------------------------------------------------- when
def test_every_few_epochs(root: Path, data: Callable[..., Any]) -> None:
    """The first, every third and the last of eight."""
    run = trainer(OnlineProbe(str(root), every_n_epochs=3), logger=None, max_epochs=8)
    run.fit(pretraining(), data())
    assert [(step + 1) // 3 for step in rows(run, "val/knn_accuracy")] == [1, 3, 6, 8]
    assert [(step + 1) // 3 for step in rows(run, "val/loss")] == list(range(1, 9))


def test_several_validations_an_epoch_and_a_run_by_steps(root: Path, data: Callable[..., Any]) -> None:
    options: dict[str, Any] = {"val_check_interval": 1, "max_epochs": -1, "max_steps": 5, "num_sanity_val_steps": 1}
    run = trainer(OnlineProbe(str(root), every_n_epochs=2), logger=None, **options)
    run.fit(pretraining(), data())
    assert list(rows(run, "val/knn_accuracy")) == [0, 3, 4]  # the first one, and those of the second epoch


def test_as_the_monitor_of_a_resumed_run(root: Path, data: Callable[..., Any]) -> None:
    """A resumed run measures, and keeps, what the uninterrupted one does, between two measurements too."""

    def fit(epochs: int, name: str, checkpoint: str | None = None) -> tuple[Trainer, RotationPrediction]:
        L.seed_everything(0, verbose=False)
        best = BestCheckpoint("val/knn_accuracy", "max")
        options: dict[str, Any] = {"max_epochs": epochs, "enable_checkpointing": True, "logger": None}
        run = trainer(OnlineProbe(str(root), every_n_epochs=4), best, experiment=name, **options)
        module = pretraining(rotations="random")
        run.fit(module, data(), ckpt_path=checkpoint)
        return run, module

    whole, trained = fit(7, "whole")
    best = torch.load(f"{whole.log_dir}/checkpoints/best.ckpt", weights_only=True)
    values = rows(whole, "val/knn_accuracy")
    assert {(step + 1) // 3 for step in values} == {1, 4, 7}
    assert values[best["epoch"] * 3 + 2] == max(values.values())
    stopped, _ = fit(5, "stopped")
    checkpoint = f"{stopped.log_dir}/checkpoints/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    resumed, again = fit(7, "resumed", checkpoint)
    assert rows(resumed, "val/knn_accuracy") == {step: value for step, value in values.items() if step > 15}
    assert any("OnlineProbe" in key for key in content["callbacks"])
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_fast_dev_run(root: Path, data: Callable[..., Any]) -> None:
    """One batch of each part."""
    module, sizes = pretraining(), []
    module.backbone.register_forward_hook(lambda _, images, features: sizes.append(len(features)))
    trainer(OnlineProbe(str(root)), fast_dev_run=True).fit(module, data(eval_batch_size=2))
    assert sizes[-2:] == [2, 2]
    assert sizes.count(2) == 2


def test_validate_measures(root: Path, domains: Path) -> None:
    module = ResidualClassifier(3, backbone="resnet8").eval()
    run = trainer(OnlineProbe(str(root), every_n_epochs=7), max_epochs=9)
    options: dict[str, Any] = {"image_size": 16, "crop": "none", "num_workers": 0, "batch_size": 4}
    (values,) = run.validate(module, ImageFolderDataModule(str(domains / "source"), **options), verbose=False)
    expected = expected_values(module, root, 20, lambda images: module.outputs(images).features)
    assert {name: values[f"val/{name}"] for name in NAMES} == pytest.approx(expected)
    (again,) = run.validate(module, ImageFolderDataModule(str(domains / "source"), **options), verbose=False)
    assert again == values


# ---------------------------------------------------------------------- no trace
def test_training_is_the_same_without_it(root: Path, data: Callable[..., Any]) -> None:
    """Weights, batch-norm statistics, modes and random numbers, those that no step reseeds included."""

    class Drawing(RotationPrediction):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            """Draws go on from batch to batch."""

        def on_validation_model_eval(self) -> None:
            """Everything stays in training mode."""

        def forward(self, images: Tensor) -> Tensor:
            """What the probe alone calls."""
            return super().forward(images) * torch.rand(())

        def on_validation_epoch_end(self) -> None:
            draws.append((torch.rand(()).item(), [part.training for part in self.modules()]))

    ends = []
    for probe in ([], [OnlineProbe(str(root))]):
        draws: list[Any] = []
        L.seed_everything(0, verbose=False)
        module = Drawing(backbone="resnet8", rotations="random", backbone_options={"stochastic_depth": 0.5})
        next(iter(module.backbone.children())).eval()  # a part that is kept in this mode
        trainer(*probe, max_epochs=3).fit(module, data(crop="pad"))
        ends.append((module.state_dict(), draws, [part.training for part in module.modules()], torch.rand(())))
    (plain, drawn, modes, number), (probed, drawn_too, modes_too, number_too) = ends
    assert drawn == drawn_too
    assert modes == modes_too
    assert number == number_too
    assert all(torch.equal(value, probed[name]) for name, value in plain.items())


# ---------------------------------------------------------------------- several, and mistakes
def test_two_probes(root: Path, domains: Path, data: Callable[..., Any]) -> None:
    probes = [OnlineProbe(str(root), name="a"), OnlineProbe(str(domains / "source"), val_fraction=0.3)]
    run, module = trainer(*probes), pretraining()
    run.fit(module, data())
    assert logged(run, "val/a/") == pytest.approx(expected_values(module, root, 20))
    assert logged(run) == pytest.approx(expected_values(module, domains / "source", 20, val_fraction=0.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "Expected `--trainer.callbacks.every_n_epochs` to be at least 1, but got 0"),
        ({"neighbours": 0}, "Expected `--trainer.callbacks.neighbours` to be at least 1, but got 0"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        OnlineProbe("folder", **options)


def test_mistakes_end_the_run_before_it_begins(
    root: Path, images: Callable[..., Path], tmp_path: Path, data: Callable[..., Any]
) -> None:
    images(tmp_path / "flat", None)
    images(tmp_path / "small", ["a", "b"], count=3)
    images(tmp_path / "corrupt", ["a", "b"], count=12)
    (tmp_path / "corrupt" / "b" / "3.png").write_bytes(b"")
    (tmp_path / "corrupt" / "b" / "4.png").write_bytes(b"")
    for probes, message in (
        ([OnlineProbe("none")], "`--trainer.callbacks.root` to be a folder of images, but 'none' does not exist"),
        ([OnlineProbe("flat")], "`--trainer.callbacks.root` to hold a folder for each of at least two classes"),
        ([OnlineProbe("small")], "`--trainer.callbacks.root` to have a folder 'val', or classes large enough"),
        ([OnlineProbe("corrupt")], "every file of `--trainer.callbacks.root` to be an image that can be read"),
        ([OnlineProbe(str(root), labels_per_class=13)], "`--trainer.callbacks.labels_per_class` to be no more than"),
        ([OnlineProbe(str(root), val_fraction=1)], r"`--trainer.callbacks.val_fraction` to be in \[0, 1\)"),
        ([OnlineProbe(str(root)), OnlineProbe("small")], "`--trainer.callbacks.name` of its own for each OnlineProbe"),
    ):
        module = pretraining()
        with pytest.raises(ConfigurationError, match=message):
            trainer(*probes).fit(module, data(check_images=True))
        assert module.trainer.global_step == 0


def test_from_the_shell(
    root: Path, domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAMEWORK_DEBUG", "")
    command = (
        f"fit --model RotationPrediction --model.backbone resnet8 --data UnlabelledFolderDataModule --data.folders "
        f"{domains / 'target'} --data.image_size 16 --data.crop none --data.num_workers 0 --data.batch_size 4 "
        "--data.steps_per_epoch 2 --trainer.max_epochs 1 --trainer.accelerator cpu --trainer.enable_progress_bar false "
        "--trainer.callbacks+=BestCheckpoint --trainer.callbacks.monitor val/knn_accuracy --trainer.callbacks.mode max "
        "--trainer.callbacks+=OnlineProbe --trainer.callbacks.labels_per_class 4 --trainer.callbacks.root "
    ).split()
    assert main([*command, "missing"]) == 2
    assert "Expected `--trainer.callbacks.root` to be a folder of images" in capsys.readouterr().err
    assert not list(tmp_path.rglob("version_*"))
    assert main([*command, str(root)]) == 0
    (best,) = tmp_path.rglob("best.ckpt")
    assert any("knn_accuracy" in str(state) for state in torch.load(best, weights_only=True)["callbacks"].values())


@pytest.mark.slow
def test_two_processes(root: Path, images: Callable[..., Path], tmp_path: Path) -> None:
    """37 images to learn from and 25 to measure on: the processes' shares differ."""
    vague_images(root / "train", count=1, first=12, classes="a")
    vague_images(root / "val", count=1, first=8, classes="a")
    images(tmp_path / "unlabelled", None, count=31, seed=4)
    output = tmp_path / "result.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, job.__file__, str(root), str(tmp_path / "unlabelled"), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["equal weights"]
    assert result["values"] == pytest.approx(result["expected"])
    assert result["values"] == result["values of the other"]
