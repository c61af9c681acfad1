"""Training, validation and test images of one labelled folder."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from framework.batch import LabelledBatch, PredictionBatch
from framework.datamodules import ImageFolderDataModule
from framework.datamodules.decoding import read_image
from framework.errors import ConfigurationError

Writer = Callable[..., Path]
CLASSES = ["ant", "bee", "cat"]


def build(root: Path, **options: Any) -> ImageFolderDataModule:
    defaults = {"batch_size": 4, "image_size": 16, "crop": "none", "horizontal_flip": False, "num_workers": 0}
    return ImageFolderDataModule(str(root), **{**defaults, **options})


@pytest.fixture
def parts(tmp_path: Path, images: Writer) -> Path:
    for seed, name in enumerate(("train", "val", "test")):
        images(tmp_path / "data" / name, CLASSES, count=(8, 3, 5)[seed], seed=seed)
    return tmp_path / "data"


def split(folder: Path) -> dict[str, list[str]]:
    with (folder / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row["file"] for row in rows if row["split"] == name] for name in {row["split"] for row in rows}}


def all_images(batches: list[Any]) -> Tensor:
    return torch.cat([batch.images for batch in batches])


def test_three_folders(parts: Path, recorder: Any, trainer: Any) -> None:
    data = build(parts, batch_size=6)
    assert data.class_names == CLASSES
    assert data.num_classes == 3
    run = trainer(max_epochs=1)
    run.fit(recorder, data)
    assert [type(batch) for batch in recorder.seen["train"]] == [LabelledBatch] * 4
    labels = torch.cat([batch.labels for batch in recorder.seen["train"]])
    assert torch.bincount(labels).tolist() == [8, 8, 8]  # one pass over the 24 images
    assert sum(len(batch.labels) for _, batch in recorder.seen["val"]) == 9
    run.test(recorder, data, verbose=False)
    assert torch.bincount(torch.cat([b.labels for b in recorder.seen["test"]])).tolist() == [5, 5, 5]
    run.predict(recorder, data)
    batches = recorder.seen["predict"]
    assert all(isinstance(batch, PredictionBatch) for batch in batches)
    assert sorted(path for batch in batches for path in batch.paths) == sorted(map(str, parts.glob("test/*/*")))


def test_images_are_the_files(parts: Path, recorder: Any, trainer: Any) -> None:
    data = build(parts, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    trainer().predict(recorder, data)
    for batch in recorder.seen["predict"]:
        for image, path in zip(batch.images, batch.paths, strict=True):
            pixels = read_image(path).double() / 255
            expected = (pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[
                :, None, None
            ]
            torch.testing.assert_close(image.double(), expected, atol=1e-6, rtol=0)
    assert set(recorder.arrived) == {torch.uint8}  # normalised on the device, not before


def test_validation_is_split_off_where_there_is_no_folder(parts: Path, images: Writer, tmp_path: Path) -> None:
    images(tmp_path / "other" / "train", CLASSES, count=20)
    data = build(tmp_path / "other", val_fraction=0.25)
    data.setup("fit")
    assert (len(data.train_files), len(data.val_files), len(data.test_files)) == (45, 15, 0)
    assert [data.val_files.labels.count(k) for k in range(3)] == [5, 5, 5]
    assert not set(data.train_files.paths) & set(data.val_files.paths)


def test_no_validation_share_means_training_images(tmp_path: Path, images: Writer) -> None:
    images(tmp_path / "train", CLASSES, count=4)
    data = build(tmp_path, val_fraction=0.0)
    data.setup("fit")
    assert data.val_files.paths == data.train_files.paths
    assert len(data.train_files) == 12


def test_one_folder_is_split(tmp_path: Path, images: Writer, recorder: Any, trainer: Any) -> None:
    images(tmp_path / "data", CLASSES, count=20)
    logger = CSVLogger(tmp_path / "logs")
    data = build(tmp_path / "data", test_fraction=0.3, val_fraction=0.1)
    run = trainer(logger=logger, max_epochs=1)
    run.fit(recorder, data)
    manifest = split(Path(logger.log_dir))
    assert {name: len(files) for name, files in manifest.items()} == {"train": 36, "val": 6, "test": 18}
    everything = [name for names in manifest.values() for name in names]
    assert sorted(everything) == sorted(p.relative_to(tmp_path / "data").as_posix() for p in tmp_path.glob("data/*/*"))
    run.test(recorder, data, verbose=False)
    # what was tested is what the manifest says
    expected = torch.stack([read_image(str(tmp_path / "data" / name)) for name in manifest["test"]])
    tested = data.denormalize(all_images(recorder.seen["test"])).mul(255).round().to(torch.uint8)
    assert torch.equal(tested, expected)
    trained = data.denormalize(all_images(recorder.seen["train"])).mul(255).round().to(torch.uint8)
    allowed = {read_image(str(tmp_path / "data" / name)).numpy().tobytes() for name in manifest["train"]}
    assert {image.numpy().tobytes() for image in trained} == allowed  # 36 images, 9 batches of 4


def test_split_depends_on_the_seed(tmp_path: Path, images: Writer) -> None:
    images(tmp_path, CLASSES, count=20)

    def test_files(**options: Any) -> list[str]:
        data = build(tmp_path, **options)
        data.setup("fit")
        return data.test_files.paths

    assert test_files(seed=1) == test_files(seed=1)
    assert test_files(seed=1) != test_files(seed=2)
    default = test_files()
    L.seed_everything(7, verbose=False)
    assert test_files() == test_files(seed=7) != default


def test_split_csv_survives_a_resume_and_a_changed_folder_is_refused(
    tmp_path: Path, images: Writer, make_recorder: Any, trainer: Any
) -> None:
    folder = images(tmp_path / "data", CLASSES, count=10)
    checkpoint = tmp_path / "run.ckpt"

    def logger() -> CSVLogger:
        return CSVLogger(tmp_path / "logs", version="run")

    run = trainer(max_epochs=1, logger=logger())
    run.fit(make_recorder(), build(folder))
    run.save_checkpoint(checkpoint)
    manifest = Path(run.log_dir) / "split.csv"
    written = manifest.read_text()
    manifest.write_text(written + "mine,untouched\n")
    trainer(max_epochs=2, logger=logger()).fit(make_recorder(), build(folder), ckpt_path=checkpoint)
    assert manifest.read_text() == written + "mine,untouched\n"
    trainer().test(make_recorder(), build(folder), ckpt_path=checkpoint, verbose=False)

    for change in ({"val_fraction": 0.2}, {"test_fraction": 0.3}, {"seed": 5}):
        with pytest.raises(ConfigurationError, match=r"Expected the split of the run that the checkpoint belongs to"):
            trainer().test(make_recorder(), build(folder, **change), ckpt_path=checkpoint, verbose=False)
    images(folder, CLASSES, count=11)
    for function in (trainer().test, trainer().validate, trainer(max_epochs=2).fit):
        with pytest.raises(ConfigurationError, match=f"the files below '{folder}'"):
            function(make_recorder(), build(folder), ckpt_path=checkpoint)
    # another folder is another matter
    images(tmp_path / "other", CLASSES, count=10)
    trainer().test(make_recorder(), build(tmp_path / "other"), ckpt_path=checkpoint, verbose=False)


def test_a_test_folder_does_not_ask_for_the_training_images(
    tmp_path: Path, images: Writer, make_recorder: Any, trainer: Any
) -> None:
    folder = tmp_path / "data"
    images(folder / "train", CLASSES, count=10)
    images(folder / "test", CLASSES, count=2)
    run = trainer(max_epochs=1)
    run.fit(make_recorder(), build(folder))
    run.save_checkpoint(tmp_path / "run.ckpt")
    images(folder / "train", CLASSES, count=12)
    trainer().test(make_recorder(), build(folder), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    trainer().predict(make_recorder(), build(folder), ckpt_path=tmp_path / "run.ckpt")
    with pytest.raises(ConfigurationError, match=r"Expected the split"):
        trainer().validate(make_recorder(), build(folder), ckpt_path=tmp_path / "run.ckpt", verbose=False)


def test_another_seed_cannot_resume(parts: Path, tmp_path: Path, make_recorder: Any, trainer: Any) -> None:
    run = trainer(max_epochs=1)
    run.fit(make_recorder(), build(parts, seed=3))
    run.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ConfigurationError, match=r"`--seed_everything 3`, the seed of the checkpoint's run, but got 4"):
        trainer().fit(make_recorder(), build(parts, seed=4), ckpt_path=tmp_path / "run.ckpt")
    with pytest.warns(UserWarning, match="took 4 images a step, this one takes 6"):
        trainer().fit(make_recorder(), build(parts, seed=3, batch_size=6), ckpt_path=tmp_path / "run.ckpt")


def test_a_class_called_train_is_a_class(tmp_path: Path, images: Writer) -> None:
    images(tmp_path, ["car", "train", "truck"], count=10)  # as in VisDA-2017
    data = build(tmp_path)
    data.setup("fit")
    assert data.class_names == ["car", "train", "truck"]
    assert len(data.train_files) + len(data.val_files) + len(data.test_files) == 30


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("names", [["test", "val"], ["Test", "Training"], ["training", "validation"]])
def test_parts_under_other_names(tmp_path: Path, images: Writer, names: list[str]) -> None:
    for name in names:
        images(tmp_path / name, CLASSES)
    with pytest.raises(ConfigurationError, match=f"holds '{names[0]}', '{names[1]}', and no 'train' with class"):
        _ = build(tmp_path).class_names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`--data.batch_size` to be at least 1, but got 0"),
        ({"eval_batch_size": 0}, "`--data.eval_batch_size` to be at least 1"),
        ({"steps_per_epoch": 0}, "`--data.steps_per_epoch` to be at least 1"),
        ({"num_workers": -1}, "`--data.num_workers` to be at least 0"),
        ({"val_fraction": 1.0}, r"`--data.val_fraction` to be in \[0, 1\), but got 1.0"),
        ({"test_fraction": -0.1}, r"`--data.test_fraction` to be in \[0, 1\)"),
        ({"test_fraction": 0.6, "val_fraction": 0.4}, "to leave images for training"),
        ({"image_size": 32, "resize_size": 16}, "`--data.resize_size` to be at least `--data.image_size` = 32"),
        ({"mean": (0.5,)}, "`--data.mean` to be three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "`--data.std` to be three numbers"),
        ({"crop": "middle"}, "`--data.crop` to be"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(tmp_path, **options)


def test_mistakes_leave_no_trace(parts: Path, images: Writer, tmp_path: Path, recorder: Any, trainer: Any) -> None:
    def refused(message: str, **options: Any) -> None:
        logger = CSVLogger(tmp_path / "logs")
        with pytest.raises(ConfigurationError, match=message):
            trainer(logger=logger).fit(recorder, build(parts, **options))
        assert not (tmp_path / "logs").exists()

    refused("at least one batch, `--data.batch_size` = 25 images, but 24 training images", batch_size=25)
    bad = parts / "val" / "bee" / "bad.png"
    bad.write_bytes(b"")
    refused("1 of 10 cannot: .*bad.png': empty")
    bad.unlink()
    (parts / "test" / "dog").mkdir()
    refused("classes of the training images, but under .*test.* are missing: none; and not among .*'dog'")


def test_checking_images_can_be_left_out(parts: Path, recorder: Any, trainer: Any) -> None:
    (parts / "test" / "bee" / "bad.png").write_bytes(b"")
    trainer(max_epochs=1).fit(recorder, build(parts, check_images=False))
    with pytest.raises(ConfigurationError, match=r"bad.png' to be an image that can be read"):  # found when it is read
        trainer().test(recorder, build(parts), verbose=False)


def test_images_are_decoded_once_before_training(
    parts: Path, recorder: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr("framework.datamodules.base.check_images", lambda paths, flag: checked.extend(paths))
    data = build(parts)
    run = trainer(max_epochs=1)
    run.fit(recorder, data)
    assert sorted(checked) == sorted(map(str, parts.glob("*/*/*")))
    run.test(recorder, data, verbose=False)
    assert len(checked) == 48


def test_no_test_images(tmp_path: Path, images: Writer, recorder: Any, trainer: Any) -> None:
    images(tmp_path / "train", CLASSES)
    with pytest.raises(ConfigurationError, match=r"Expected a folder 'test' under `--data.root`"):
        trainer().test(recorder, build(tmp_path), verbose=False)


def test_without_a_trainer(parts: Path) -> None:
    data = build(parts)
    data.prepare_data()
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 6
    assert sum(len(batch.labels) for batch in data.val_dataloader()) == 9
    data.setup("test")
    assert sum(len(batch.labels) for batch in data.test_dataloader()) == 15


@pytest.mark.slow
def test_the_process_ends_after_an_error_in_a_worker(parts: Path) -> None:
    """Workers leave SIGTERM to the run, with which multiprocessing would end them and wait for ever."""
    (parts / "val" / "bee" / "bad.png").write_bytes(b"")
    program = f"""
from framework import ImageFolderDataModule, ResidualClassifier, Trainer
data = ImageFolderDataModule({str(parts)!r}, batch_size=4, image_size=16, num_workers=2, check_images=False)
trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu", max_epochs=1)
try:
    trainer.fit(ResidualClassifier(3, backbone="resnet8"), data)
except ValueError as error:
    kept = error
    print("bad.png' to be an image that can be read" in str(error))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "True\n")
    assert "Exception ignored" not in ended.stderr
