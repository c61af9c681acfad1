"""Pictures of a self-supervised task: the right pixels, the same images every time, and no trace in the training."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from framework import ImageFolderDataModule, ResidualClassifier, RotationPrediction, Trainer
from framework.batch import UnlabelledBatch
from framework.callbacks import ExponentialMovingAverage, PretextImages
from framework.callbacks.pretext_images import pretext_picture
from framework.datamodules import UnlabelledFolderDataModule
from framework.errors import ConfigurationError
from framework.functional import quarter_turns
from framework.modules.pretraining import PretrainingModule
from framework.modules.pretraining.base import Encoder, PretextTask, Preview


@pytest.fixture
def data(images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Class folders with 33 images, of which 10 are for validation, in batches of 8 and 2."""
    monkeypatch.chdir(tmp_path)
    folder = images(tmp_path / "data", ["a", "b", "c"], count=11)
    defaults: dict[str, Any] = {
        "image_size": 16,
        "crop": "none",
        "num_workers": 0,
        "batch_size": 4,
        "val_fraction": 0.3,
    }
    defaults |= {"horizontal_flip": False, "eval_batch_size": 8, "steps_per_epoch": 2}
    return lambda **options: UnlabelledFolderDataModule(str(folder), **{**defaults, **options})


def trainer(*callbacks: L.Callback, **options: Any) -> Trainer:
    defaults = {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu", "enable_checkpointing": False}
    return Trainer(**{**defaults, "callbacks": list(callbacks), **options})


def rotation(**options: Any) -> RotationPrediction:
    torch.manual_seed(0)
    return RotationPrediction(**{"backbone": "resnet8", "learning_rate": 0.01, **options})


def shown(run: Trainer) -> dict[int, np.ndarray[Any, Any]]:
    events = EventAccumulator(str(run.log_dir), size_guidance={"images": 0}).Reload()
    if "val/pretext" not in events.Tags()["images"]:
        return {}
    images = events.Images("val/pretext")
    return {event.step: np.array(Image.open(io.BytesIO(event.encoded_image_string))) for event in images}


def tile(picture: np.ndarray[Any, Any], row: int, column: int, size: int = 96) -> Tensor:
    """The pixels of a picture of 16 pixels, which is shown six times as large; 4 pixels around, 21 for the caption."""
    height = (picture.shape[0] - 4) // (picture.shape[0] // (size + 10))
    y, x = 4 + row * height, 4 + column * (size + 4)
    return torch.from_numpy(picture[y : y + size : 6, x : x + size : 6].copy()).permute(2, 0, 1)


# ---------------------------------------------------------------------- the picture
def test_small_images_are_enlarged() -> None:
    pictures = torch.rand(3, 2, 3, 28, 28)
    pixels = pretext_picture(pictures, [["", ""]] * 3)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 4 + 3 * (112 + 4), 4 + 2 * (112 + 4))  # four times as large
    for row in range(3):
        for column in range(2):
            y, x = 4 + row * 116, 4 + column * 116
            found = pixels[:, y : y + 112, x : x + 112]
            expected = pictures[row, column].mul(255).byte().repeat_interleave(4, 1).repeat_interleave(4, 2)
            assert (found.int() - expected.int()).abs().max() <= 1
            assert (pixels[:, y + 112 : y + 116] == 255).all()


def test_large_images_stay() -> None:
    assert pretext_picture(torch.rand(2, 3, 3, 200, 100), [[""] * 3] * 2).shape == (3, 4 + 2 * 204, 4 + 3 * 104)


def test_captions_stand_below_and_have_room() -> None:
    pictures = torch.ones(1, 2, 3, 100, 100)
    bare = pretext_picture(pictures, [["", ""]])
    one = pretext_picture(pictures, [["", "90°: 0°"]])
    assert one.shape[1] > bare.shape[1]
    assert (one[:, : bare.shape[1]] == 255).all()  # nothing is written on the pictures
    strip = one[:, bare.shape[1] - 1 :]
    assert (strip[:, :, :104] == 255).all()
    assert (strip[:, :, 104:] < 100).any()
    assert (strip[:, -2:] == 255).all()
    long = "a caption that is a good deal wider than the picture above it"
    wide = pretext_picture(pictures, [["", long]])
    edges = torch.cat([wide[:, :, :2], wide[:, :, -2:]], dim=2)
    assert wide.shape[2] > 2 * 300
    assert (edges == 255).all()  # none is cut off


# ---------------------------------------------------------------------- in a run
def test_of_a_run(data: Callable[..., Any]) -> None:
    """As many rows as asked for, the first validation images in their four rotations and in their own colours."""
    run, module, folder = trainer(PretextImages(most=3), max_epochs=2), rotation(), data()
    run.fit(module, folder)
    pictures = shown(run)
    assert list(pictures) == [2, 4]
    assert pictures[4].shape[1] == 4 + 4 * 100
    for row, path in enumerate(folder.val_files.paths[:3]):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        for column, turned in enumerate(quarter_turns(pixels[None])[:, 0]):
            assert (tile(pictures[4], row, column).int() - turned.int()).abs().max() <= 1
    assert pictures[4].shape[0] < 4 + 3 * 130  # no fourth row


def test_every_few_epochs(data: Callable[..., Any]) -> None:
    run = trainer(PretextImages(every_n_epochs=2), max_epochs=5)
    run.fit(rotation(), data())
    assert [step // 2 for step in shown(run)] == [2, 4, 5]


class Noisy(PretextTask):
    """Draws something for every picture, and looks at itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.looks: list[tuple[bool, bool, torch.dtype, int]] = []

    def forward(self, encode: Encoder, images: Tensor) -> Tensor:
        return encode(images.flatten(0, -4)).float().square().mean() * torch.rand(())

    def preview(self, encode: Encoder, images: Tensor) -> Preview:
        features = encode(images.flatten(0, -4))
        self.looks.append((self.training, features.requires_grad, features.dtype, len(images)))
        return super().preview(encode, images + torch.randn_like(images))


class NoisyPretraining(PretrainingModule):
    views = (1, 2)

    def __init__(self, **options: Any) -> None:
        super().__init__(backbone="resnet8", learning_rate=0.01, **options)
        self.task = Noisy()


class Unseeded(NoisyPretraining):
    """Its draws go on from batch to batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """No reseeding."""

    def validation_step(self, batch: UnlabelledBatch, batch_idx: int) -> None:
        """No reseeding here either."""
        self.log("val/loss", self.task(self.backbone, batch.images))


def test_the_same_images_and_draws_every_time(data: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    run, module = trainer(max_epochs=3), Unseeded()
    run.fit(module, data())  # by default
    pictures = list(shown(run).values())
    assert len(pictures) == 3
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    assert module.task.looks == [(False, False, torch.float32, 8)] * 3  # type: ignore[comparison-overlap]


def test_views_and_half_precision(data: Callable[..., Any]) -> None:
    """Both views of an image side by side, without room for captions that there are none of."""
    run, module = trainer(precision="bf16-mixed"), NoisyPretraining()
    run.fit(module, data(views=2))
    (picture,) = shown(run).values()
    assert picture.shape == (4 + 8 * 100, 4 + 2 * 100, 3)
    assert module.task.looks == [(False, False, torch.bfloat16, 8)]  # type: ignore[comparison-overlap]


def test_an_average_of_the_weights(data: Callable[..., Any]) -> None:
    """It is the average's answers that are shown, whatever the order of the callbacks."""
    for order in (1, -1):
        seen: list[Tensor] = []

        class Looking(RotationPrediction):
            def preview(self, images: Tensor) -> Preview:
                seen.append(next(self.backbone.parameters()).clone())  # noqa: B023
                return super().preview(images)

        run, module = trainer(*[ExponentialMovingAverage(0.9), PretextImages()][::order]), Looking(backbone="resnet8")
        run.fit(module, data())
        assert torch.equal(seen[0], next(module.backbone.parameters()))  # what a run ends with


def test_training_is_the_same_without_it(data: Callable[..., Any]) -> None:
    ends = []
    for every in (1, 100):
        L.seed_everything(0, verbose=False)
        module = Unseeded()
        next(iter(module.backbone.children())).eval()
        trainer(PretextImages(every_n_epochs=every), max_epochs=4).fit(module, data())
        ends.append((module.state_dict(), [part.training for part in module.modules()], torch.rand(())))
        assert len(module.task.looks) == {1: 4, 100: 1}[every]  # type: ignore[arg-type]
    (plain, modes, number), (seen, modes_too, number_too) = ends
    assert modes == modes_too
    assert number == number_too
    assert all(torch.equal(value, seen[name]) for name, value in plain.items())


def test_loaders_of_the_users_own(data: Callable[..., Any]) -> None:
    """Without a datamodule the pictures are stretched to what can be shown."""
    images = [UnlabelledBatch(5 * torch.randn(3, 16, 16)) for _ in range(4)]
    run = trainer()
    run.fit(rotation(), DataLoader(images, batch_size=4), DataLoader(images, batch_size=4))  # type: ignore[arg-type]
    (picture,) = shown(run).values()
    tiles = torch.stack([tile(picture, row, 0) for row in range(4)])
    assert tiles.min() == 0
    assert tiles.max() >= 254


def test_where_there_is_nothing_to_show(data: Callable[..., Any], tmp_path: Path) -> None:
    folder = ImageFolderDataModule(
        str(tmp_path / "data"), image_size=16, crop="none", num_workers=0, batch_size=4, steps_per_epoch=1
    )
    classifier = trainer()
    classifier.fit(ResidualClassifier(3, backbone="resnet8"), folder)
    assert not shown(classifier)
    for options in ({"logger": False}, {"fast_dev_run": True}):
        module = NoisyPretraining()
        trainer(PretextImages(), **options).fit(module, data())
        assert not module.task.looks  # type: ignore[truthy-bool]
    module = NoisyPretraining()
    run = trainer(num_sanity_val_steps=1)
    run.fit(module, data())
    assert len(module.task.looks) == 1  # type: ignore[arg-type]
    run.validate(module, data(), verbose=False)
    assert len(module.task.looks) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["most", "every_n_epochs"])
def test_options(option: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"`--trainer.callbacks.{option}` to be at least 1, but got 0"):
        PretextImages(**{option: 0})
