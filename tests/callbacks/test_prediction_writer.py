"""Predictions as a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from framework import ImageFolderDataModule, ResidualClassifier, Trainer

CLASSES = ["ant", "bee", "cat"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def build(domains: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(
        str(domains / "source"), predict=str(domains / "target"), batch_size=4, image_size=16, num_workers=0, **options
    )


def test_one_row_an_image(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, model = build(domains), ResidualClassifier(3, backbone="resnet8")
    torch.nn.init.normal_(model.head.weight)
    trainer = Trainer(enable_progress_bar=False, accelerator="cpu")
    trainer.predict(model, data)
    folder = Path(str(trainer.log_dir))
    rows = table(folder / "predictions.csv")
    assert list(rows[0]) == ["path", "class", "probability", *(f"probability of {name}" for name in CLASSES)]
    assert [row["path"] for row in rows] == sorted(map(str, (domains / "target").iterdir()))
    model.eval()
    expected = {}
    for batch in data.predict_dataloader():
        with torch.no_grad():
            probabilities = model(data.normalize(batch.images)).softmax(dim=1)
        expected.update(zip(batch.paths, probabilities, strict=True))
    for row in rows:
        probabilities = [float(row[f"probability of {name}"]) for name in CLASSES]
        assert sum(probabilities) == pytest.approx(1, abs=2e-6)
        assert probabilities == pytest.approx(expected[row["path"]].tolist(), abs=1e-5)
        assert row["class"] == CLASSES[probabilities.index(max(probabilities))]
        assert float(row["probability"]) == max(probabilities)
    assert "Predictions of 31 images: lightning_logs/default/version_0/predictions.csv" in capsys.readouterr().out
    first = (folder / "predictions.csv").read_bytes()
    trainer.predict(model, data)
    trainer.predict(model, data)
    assert (folder / "predictions.csv").read_bytes() == first == (folder / "predictions_2.csv").read_bytes()
    assert len(table(folder / "predictions_1.csv")) == 31


def test_a_part_of_the_images(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ResidualClassifier(3, backbone="resnet8")
    trainer = Trainer(enable_progress_bar=False, accelerator="cpu", limit_predict_batches=2)
    trainer.predict(model, build(domains))
    assert len(table(Path(str(trainer.log_dir)) / "predictions.csv")) == 16


def test_a_broken_prediction_leaves_no_rows_behind(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Breaks(ResidualClassifier):
        broken = True

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2 and self.broken:
                raise KeyError("broken")
            return super().predict_step(batch, batch_idx)

    model = Breaks(3, backbone="resnet8")
    trainer = Trainer(enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(KeyError):
        trainer.predict(model, build(domains))
    model.broken = False
    trainer.predict(model, build(domains))
    assert len(table(Path(str(trainer.log_dir)) / "predictions.csv")) == 31


def test_nothing_without_a_logger(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(enable_progress_bar=False, accelerator="cpu", logger=False)
    batches = trainer.predict(ResidualClassifier(3, backbone="resnet8"), build(domains))
    assert batches is not None
    assert len(batches) == 4
    assert list(tmp_path.iterdir()) == []
