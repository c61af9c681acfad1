"""A run's folder, and what is logged there."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framework import ImageFolderDataModule, ResidualClassifier, Trainer
from framework.errors import ConfigurationError
from framework.loggers import AppendingCSVLogger, TensorBoardRun


def rows(folder: Path) -> list[tuple[int, str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        reader = csv.reader(file)
        assert next(reader) == ["step", "name", "value"]
        return [(int(step), name, float(value)) for step, name, value in reader]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    # files of one second come in the order of their names
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


# ---------------------------------------------------------------------- folders
def claim(root: Path) -> int:
    return int(TensorBoardRun(root, "experiment").version)


def test_versions_are_counted_up(tmp_path: Path) -> None:
    assert [claim(tmp_path) for _ in range(3)] == [0, 1, 2]
    (tmp_path / "experiment" / "version_7").mkdir()
    assert claim(tmp_path) == 8
    assert [path.name for path in sorted((tmp_path / "experiment").iterdir())] == [
        "version_0",
        "version_1",
        "version_2",
        "version_7",
        "version_8",
    ]


def test_a_version_is_claimed_once_and_only_when_asked_for(tmp_path: Path) -> None:
    logger = TensorBoardRun(tmp_path, "a/b")
    assert not (tmp_path / "a").exists()
    assert logger.version == logger.version == 0
    assert Path(logger.log_dir) == tmp_path / "a" / "b" / "version_0"


def test_threads_do_not_share_a_run(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        versions = list(pool.map(lambda _: claim(tmp_path), range(64)))
    assert sorted(versions) == list(range(64))


def test_processes_do_not_share_a_run(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        versions = pool.map(claim, [tmp_path] * 24, chunksize=1)
    assert sorted(versions) == list(range(24))


def test_an_existing_run_is_continued(tmp_path: Path) -> None:
    first = TensorBoardRun(tmp_path, "experiment")
    folder = Path(first.log_dir)
    again = TensorBoardRun(tmp_path, "experiment", folder.name)
    assert Path(again.log_dir) == folder
    assert claim(tmp_path) == 1


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "experiment").write_text("a file")
    with pytest.raises(ConfigurationError, match=f"Expected to write the run below '{tmp_path}/experiment'"):
        claim(tmp_path)


# ---------------------------------------------------------------------- metrics.csv
def test_rows_are_appended(tmp_path: Path) -> None:
    for run in range(2):
        logger = AppendingCSVLogger(TensorBoardRun(tmp_path, "experiment", "version_0"))
        logger.log_metrics({"train/loss": 0.5 + run, "epoch": 3}, step=run)
        logger.log_hyperparams({"a": 1})
    assert rows(tmp_path / "experiment" / "version_0") == [(0, "train/loss", 0.5), (1, "train/loss", 1.5)]
    assert (logger.name, logger.version) == ("experiment", "version_0")


# ---------------------------------------------------------------------- a run
@pytest.fixture
def data(images: Callable[..., Path], tmp_path: Path) -> ImageFolderDataModule:
    images(tmp_path / "data", ["a", "b"], count=12)
    return ImageFolderDataModule(str(tmp_path / "data"), batch_size=4, image_size=16, num_workers=0)


def train(data: ImageFolderDataModule, **options: Any) -> Path:
    checkpoint = options.pop("ckpt_path", None)
    trainer = Trainer(enable_progress_bar=False, log_every_n_steps=1, accelerator="cpu", **options)
    model = ResidualClassifier(2, backbone="resnet8")
    trainer.fit(model, data, ckpt_path=checkpoint)
    trainer.test(model, data, verbose=False)
    return Path(str(trainer.log_dir))


def test_both_loggers_have_every_scalar(
    data: ImageFolderDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = train(data, experiment="study/first", max_epochs=2)
    assert folder == Path("lightning_logs/study/first/version_0")
    table, board = rows(folder), scalars(folder)
    assert {name for _, name, _ in table} == set(board)
    assert {name.split("/")[0] for name in board} == {"train", "val", "test"}
    assert set(board) >= {
        "train/loss",
        "train/learning_rate/backbone",
        "train/learning_rate/head",
        "train/gradient_norm/backbone",
        "train/gradient_norm/head",
        "val/accuracy",
        "val/loss",
        "test/accuracy",
        "test/mean_class_accuracy",
        "test/macro_f1",
        "test/calibration_error",
    }
    for name, points in board.items():
        assert [(step, pytest.approx(value)) for step, _, value in table if _ == name] == points
    assert [step for step, _ in board["train/loss"]] == list(range(8))


def test_a_resumed_run_keeps_its_rows(
    data: ImageFolderDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = train(data, max_epochs=1)
    before = (folder / "metrics.csv").read_text()
    again = train(data, max_epochs=2, run=str(folder), ckpt_path=str(folder / "checkpoints" / "last.ckpt"))
    assert again.resolve() == folder.resolve()
    after = (folder / "metrics.csv").read_text()
    assert after.startswith(before)
    assert after.count("step,name,value") == 1
    losses = [(step, value) for step, name, value in rows(folder) if name == "train/loss"]
    assert [step for step, _ in losses] == list(range(8))
    assert [(s, pytest.approx(v)) for s, v in losses] == scalars(folder)["train/loss"]
    assert train(data, max_epochs=1).name == "version_1"
