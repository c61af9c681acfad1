"""Normalisation, precision, epochs and random numbers: what both datamodules share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from framework.datamodules import ImageFolderDataModule
from framework.datamodules.normalization import Normalization

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def build(root: Path, **options: Any) -> ImageFolderDataModule:
    defaults: dict[str, Any] = {"batch_size": 4, "image_size": 16, "crop": "pad", "num_workers": 0}
    return ImageFolderDataModule(str(root / "source"), **{**defaults, "mean": MEAN, "std": STD, **options})


def test_denormalize_is_the_inverse(domains: Path) -> None:
    data = build(domains)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, None]
    normalised = data.normalize(pixels)
    assert normalised.dtype == torch.float32
    assert normalised[0, 1, 0, 255].item() == pytest.approx((1 - 0.5) / 0.3)
    assert torch.equal(data.denormalize(normalised).mul(255).round().to(torch.uint8), pixels)
    assert data.denormalize(torch.full((1, 3, 1, 1), 100.0)).max() == 1


@pytest.mark.parametrize("shape", [(3, 9, 8), (4, 3, 9, 8), (4, 2, 3, 9, 8)])
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 0.01), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("may", [False, True])
def test_normalized_pixels(
    shape: tuple[int, ...], innermost: bool, dtype: torch.dtype, error: float, may: bool
) -> None:
    """Whatever their layout in memory is, which is kept where it may be."""
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    columns = torch.tensor([MEAN, STD], dtype=torch.float64).view(2, 3, 1, 1)
    expected = (pixels.double() / 255 - columns[0]) / columns[1]
    given = pixels.movedim(-3, -1).contiguous().movedim(-1, -3) if innermost else pixels
    normalization = Normalization()
    found = normalization.apply(given, MEAN, STD, dtype, channels_last=may)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < error
    assert found.movedim(-3, -1).is_contiguous() == (innermost and may)
    assert found.is_contiguous() != (innermost and may)
    assert (normalization.invert(found, MEAN, STD).double() - pixels.double() / 255).abs().max() < error


@pytest.mark.parametrize("innermost", [False, True])
def test_images_have_the_layout_of_the_models_weights(
    domains: Path, make_recorder: Any, trainer: Any, innermost: bool
) -> None:
    recorder = make_recorder()
    recorder.convolution = torch.nn.Conv2d(3, 4, 3)
    if innermost:
        recorder.to(memory_format=torch.channels_last)
    trainer(max_epochs=1).fit(recorder, build(domains))
    for images in (recorder.seen["train"][0].images, recorder.seen["val"][0][1].images):
        assert images.is_contiguous() != innermost
        assert images.is_contiguous(memory_format=torch.channels_last) == innermost


def test_pixels_that_are_given_are_not_changed(domains: Path) -> None:
    images = torch.full((1, 3, 2, 2), 255.0)
    build(domains).normalize(images)
    assert images.min() == 255


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
    ],
)
def test_images_have_the_precision_of_the_model(
    domains: Path, recorder: Any, trainer: Any, precision: Any, dtype: torch.dtype
) -> None:
    trainer(precision=precision, limit_train_batches=1, max_epochs=1, limit_val_batches=1).fit(recorder, build(domains))
    assert recorder.seen["train"][0].images.dtype == dtype
    assert recorder.seen["val"][0][1].images.dtype == dtype
    assert set(recorder.arrived) == {torch.uint8}


def epochs(trainer: L.Trainer, recorder: Any, data: ImageFolderDataModule, **options: Any) -> list[int]:
    """Fit, and count the batches of each epoch."""
    lengths: list[int] = []

    class Count(L.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            lengths.append(-len(recorder.seen["train"]))

        def on_train_epoch_end(self, *_: Any) -> None:
            lengths[-1] += len(recorder.seen["train"])

    trainer.callbacks.append(Count())  # type: ignore[attr-defined]
    trainer.fit(recorder, data, **options)
    return lengths


@pytest.mark.parametrize(
    ("workers", "steps", "limit", "expected"),
    [
        (0, None, None, 6),  # 39 source images, of which 12 for test and validation: 27 // 4
        (0, 10, None, 10),
        (0, 10, 30, 10),
        (0, 10, 1.0, 10),
        (0, 10, 3, 3),
        (2, 10, 3, 3),
        (0, 10, 0.5, 5),
        (0, 10, 0.35, 3),
        (2, 10, 0.35, 3),
    ],
)
def test_length_of_an_epoch(
    domains: Path, recorder: Any, trainer: Any, workers: int, steps: int | None, limit: Any, expected: int
) -> None:
    run = trainer(limit_train_batches=limit, max_epochs=4, limit_val_batches=0)
    data = build(domains, num_workers=workers, crop="none", horizontal_flip=False, steps_per_epoch=steps)
    assert epochs(run, recorder, data) == [expected] * 4
    assert run.num_training_batches == expected
    # the stream goes on where the epoch before has stopped
    images = torch.cat([batch.images for batch in recorder.seen["train"]])
    size = len(data.train_files)
    for first in range(0, len(images) - size + 1, size):
        assert len(images[first : first + size].flatten(1).unique(dim=0)) == size


def test_no_batches_at_all(domains: Path, recorder: Any, trainer: Any) -> None:
    trainer(limit_train_batches=0).fit(recorder, build(domains))
    assert recorder.seen["train"] == []


@pytest.mark.parametrize("limit", [3, 0.35])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resumes_within_limited_epochs(
    domains: Path, make_recorder: Any, trainer: Any, tmp_path: Path, limit: Any, stop: int
) -> None:
    options = {"limit_train_batches": limit, "max_epochs": 3, "limit_val_batches": 0}
    whole = make_recorder()

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if len(whole.seen["train"]) == stop:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    trainer(**options, callbacks=[Save()]).fit(whole, build(domains, steps_per_epoch=10))
    rest = make_recorder()
    trainer(**options).fit(rest, build(domains, steps_per_epoch=10), ckpt_path=tmp_path / "run.ckpt")
    expected = whole.seen["train"][stop:]
    assert len(expected) == 9 - stop == len(rest.seen["train"])
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, rest.seen["train"], strict=True))


def test_an_epoch_of_another_length_can_follow(domains: Path, make_recorder: Any, trainer: Any, tmp_path: Path) -> None:
    run = trainer(max_epochs=1, limit_val_batches=0)
    run.fit(make_recorder(), build(domains, steps_per_epoch=5))
    run.save_checkpoint(tmp_path / "run.ckpt")
    run = trainer(max_epochs=3, limit_val_batches=0)
    data = build(domains, steps_per_epoch=7)
    assert epochs(run, make_recorder(), data, ckpt_path=tmp_path / "run.ckpt") == [7, 7]


def test_random_numbers_do_not_depend_on_the_workers(domains: Path, make_recorder: Any, trainer: Any) -> None:
    seen, drawn = [], []
    for workers in (0, 2):
        recorder = make_recorder()
        torch.manual_seed(1)
        trainer(max_epochs=2).fit(recorder, build(domains, num_workers=workers))
        seen.append(torch.cat([batch.images for batch in recorder.seen["train"]]))
        drawn.append(recorder.random)
    assert torch.equal(*seen)
    assert drawn[0] == drawn[1]
    torch.manual_seed(1)
    assert drawn[0] == [torch.rand(()).item() for _ in drawn[0]]  # nothing but the module draws


def test_overfitting_a_few_batches(domains: Path, recorder: Any, trainer: Any) -> None:
    trainer(overfit_batches=2, max_epochs=2).fit(recorder, build(domains))
    batches = [batch.images for batch in recorder.seen["train"]]
    assert len(batches) == 4
    assert torch.equal(batches[0], batches[2])
    assert torch.equal(batches[1], batches[3])


def test_hyperparameters_are_in_the_checkpoint(domains: Path, recorder: Any, trainer: Any, tmp_path: Path) -> None:
    run = trainer(max_epochs=1)
    run.fit(recorder, build(domains))
    run.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"]["batch_size"] == 4
    assert checkpoint["ImageFolderDataModule"]["batches"] == 6
    again = ImageFolderDataModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert again.root == str(domains / "source")


def test_batches_are_moved_where_there_is_a_device_to_move_them_to(domains: Path) -> None:
    data = build(domains)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert data.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert type(moved) is type(batch)
    assert {tensor.device.type for tensor in moved} == {"meta"}
