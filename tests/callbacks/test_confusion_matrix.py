"""The confusion matrix of a test."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.metrics import confusion_matrix
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framework import ImageFolderDataModule, ResidualClassifier, Trainer
from framework.callbacks.confusion_matrix import confusion_picture

CLASSES = ["ant", "bee", "cat", "dog"]


def table(folder: Path) -> list[list[str]]:
    with (folder / "confusion_matrix.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_counts_equal_scikit_learns(
    images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "train", CLASSES, count=4)
    for label, name in enumerate(CLASSES):
        images(tmp_path / "test" / name, None, count=3 + label, offset=60 * label, seed=label)
    data = ImageFolderDataModule(str(tmp_path), batch_size=4, image_size=16, crop="none", num_workers=0)
    model = ResidualClassifier(4, backbone="resnet8")
    torch.nn.init.normal_(model.head.weight)
    trainer = Trainer(enable_progress_bar=False, accelerator="cpu")
    for _ in range(2):  # a second test counts anew
        trainer.test(model, data, verbose=False)
    rows = table(Path(str(trainer.log_dir)))
    assert rows[0] == ["true \\ predicted", *CLASSES]
    assert [row[0] for row in rows[1:]] == CLASSES
    model.eval()
    true, predicted = [], []
    for batch in data.test_dataloader():
        true += batch.labels.tolist()
        predicted += model(data.normalize(batch.images)).argmax(dim=1).tolist()
    assert len(set(predicted)) > 1
    assert [[int(n) for n in row[1:]] for row in rows[1:]] == confusion_matrix(
        true, predicted, labels=range(4)
    ).tolist()
    events = EventAccumulator(str(trainer.log_dir))
    events.Reload()
    assert "test/confusion_matrix" in events.Tags()["images"]


def test_nothing_without_a_logger(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = ImageFolderDataModule(str(domains / "source"), batch_size=4, image_size=16, num_workers=0)
    for options in ({"logger": False}, {"fast_dev_run": True}):
        Trainer(enable_progress_bar=False, accelerator="cpu", **options).test(
            ResidualClassifier(3, backbone="resnet8"), data, verbose=False
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("classes", [2, 12, 13, 31, 32, 65, 66, 345, 1000])
def test_picture_of_any_number_of_classes(classes: int) -> None:
    counts = torch.eye(classes).long() * 7
    counts[0] = 0  # a class without test images
    picture = confusion_picture(counts, [f"class number {i} with a long name" for i in range(classes)])
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    assert picture.shape[1] == picture.shape[2] <= 2100
    dark = torch.tensor([8, 48, 107], dtype=torch.uint8)[:, None, None]
    assert (picture == dark).all(dim=0).any()
