"""Sample images in TensorBoard: once, and as they are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from framework import (
    DANN,
    DomainPairDataModule,
    ImageFolderDataModule,
    ResidualClassifier,
    RotationPrediction,
    Trainer,
    UnlabelledFolderDataModule,
)
from framework.batch import DomainBatch, LabelledBatch, UnlabelledBatch
from framework.callbacks import SampleImages


class FirstBatch(L.Callback):
    batch: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.batch is None:
            self.batch = batch


def pictures(folder: str | None) -> dict[str, list[np.ndarray[Any, Any]]]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {
        tag: [np.array(Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images(tag)]
        for tag in events.Tags()["images"]
        if tag.startswith("train/")
    }


def cells(grid: np.ndarray[Any, Any], count: int, size: int = 16) -> list[bytes]:
    """The images of a grid of eight a row, with two pixels around each."""
    step = size + 2
    origins = [(2 + (i // 8) * step, 2 + (i % 8) * step) for i in range(count)]
    return [grid[y : y + size, x : x + size].tobytes() for y, x in origins]


def expected(images: Tensor, data: Any) -> list[bytes]:
    pixels = data.denormalize(images).mul(255).round().to(torch.uint8)
    return [image.permute(1, 2, 0).numpy().tobytes() for image in pixels]


def test_both_domains_once(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = DomainPairDataModule(
        str(domains / "source"), str(domains / "target"), batch_size=10, steps_per_epoch=2, image_size=16, num_workers=0
    )
    first = FirstBatch()
    options: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, callbacks=first, **options)
    trainer.fit(DANN(3, backbone="resnet8"), data)
    shown = pictures(trainer.log_dir)
    assert {tag: len(grids) for tag, grids in shown.items()} == {"train/source": 1, "train/target": 1}
    # TensorBoard's pixels are floats cut off, not rounded
    for tag, images in (("train/source", first.batch.source.images), ("train/target", first.batch.target)):
        drawn = np.frombuffer(b"".join(cells(shown[tag][0], 10)), dtype=np.uint8).astype(int)
        wanted = np.frombuffer(b"".join(expected(images, data)), dtype=np.uint8).astype(int)
        assert np.abs(drawn - wanted).max() <= 1
    # a resumed run does not show them again
    checkpoint = str(Path(str(trainer.log_dir)) / "checkpoints" / "last.ckpt")
    again = Trainer(max_epochs=3, run=trainer.log_dir, **options)
    again.fit(DANN(3, backbone="resnet8"), data, ckpt_path=checkpoint)
    assert {tag: len(grids) for tag, grids in pictures(again.log_dir).items()} == {"train/source": 1, "train/target": 1}


def test_a_grid_for_each_source_folder(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [str(domains / "source"), str(domains / "target_test")]
    data = DomainPairDataModule(
        sources, str(domains / "target"), batch_size=10, steps_per_epoch=1, image_size=16, num_workers=0
    )
    first = FirstBatch()
    trainer = Trainer(max_epochs=1, callbacks=first, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(DANN(3, backbone="resnet8"), data)
    shown = pictures(trainer.log_dir)
    assert set(shown) == {"train/source_0", "train/source_1", "train/target"}
    for domain in (0, 1):
        drawn = np.frombuffer(b"".join(cells(shown[f"train/source_{domain}"][0], 5)), dtype=np.uint8).astype(int)
        wanted = b"".join(expected(first.batch.source.images[domain::2], data))
        assert np.abs(drawn - np.frombuffer(wanted, dtype=np.uint8).astype(int)).max() <= 1


@pytest.mark.parametrize("several", [False, True])
def test_a_grid_for_each_unlabelled_folder(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [str(domains / "source"), str(domains / "target")] if several else str(domains / "source")
    data = UnlabelledFolderDataModule(folders, batch_size=10, steps_per_epoch=1, image_size=16, num_workers=0)
    first = FirstBatch()
    trainer = Trainer(max_epochs=1, callbacks=first, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(RotationPrediction(backbone="resnet8"), data)
    shown = pictures(trainer.log_dir)
    grids = {"train/folder_0": slice(0, None, 2), "train/folder_1": slice(1, None, 2)}
    grids = grids if several else {"train/images": slice(None)}
    assert set(shown) == set(grids)
    for tag, which in grids.items():
        wanted = expected(first.batch.images[which], data)
        drawn = np.frombuffer(b"".join(cells(shown[tag][0], len(wanted))), dtype=np.uint8).astype(int)
        assert np.abs(drawn - np.frombuffer(b"".join(wanted), dtype=np.uint8).astype(int)).max() <= 1


def test_views_of_an_image_side_by_side(domains: Path, tmp_path: Path) -> None:
    """Of every kind of batch."""
    images = torch.randn(4, 2, 3, 16, 16)
    labelled = LabelledBatch(images, torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 0, 1]))
    data = UnlabelledFolderDataModule(["a", "b"], batch_size=4, views=2)
    for batch, grids in (
        (UnlabelledBatch(images), {"train/folder_0": images[::2], "train/folder_1": images[1::2]}),
        (labelled, {"train/images": images}),
        (
            DomainBatch(labelled, images),
            {"train/source_0": images[::2], "train/source_1": images[1::2], "train/target": images},
        ),
    ):
        logger = TensorBoardLogger(tmp_path, name=type(batch).__name__)
        trainer = L.Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False, enable_model_summary=False)
        monkey: Any = trainer
        monkey.datamodule = data
        SampleImages().on_train_batch_start(trainer, L.LightningModule(), batch, 0)
        logger.finalize("success")
        shown = pictures(logger.log_dir)
        assert set(shown) == set(grids)
        for tag, chosen in grids.items():
            wanted = expected(chosen.flatten(0, 1), data)
            drawn = np.frombuffer(b"".join(cells(shown[tag][0], len(wanted))), dtype=np.uint8).astype(int)
            assert np.abs(drawn - np.frombuffer(b"".join(wanted), dtype=np.uint8).astype(int)).max() <= 1


def test_as_many_as_asked_for(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = ImageFolderDataModule(str(domains / "source"), batch_size=12, image_size=16, num_workers=0)
    trainer = Trainer(max_epochs=1, callbacks=SampleImages(most=3), enable_progress_bar=False, accelerator="cpu")
    trainer.fit(ResidualClassifier(3, backbone="resnet8"), data)
    shown = pictures(trainer.log_dir)
    assert [grid.shape for grid in shown["train/images"]] == [(20, 3 * 18 + 2, 3)]


class Floats(Dataset[LabelledBatch]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return LabelledBatch(torch.randn(3, 16, 16) * 5, torch.tensor(index % 2))


def test_loaders_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(max_epochs=1, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(ResidualClassifier(2, backbone="resnet8"), DataLoader(Floats(), batch_size=4))
    (grid,) = pictures(trainer.log_dir)["train/images"]
    assert {(cell.min(), cell.max()) for cell in (np.frombuffer(c, np.uint8) for c in cells(grid, 4))} == {(0, 255)}
