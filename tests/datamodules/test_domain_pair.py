"""Paired batches of a labelled source and an unlabelled target."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from framework.batch import DomainBatch, LabelledBatch
from framework.datamodules import DomainPairDataModule
from framework.datamodules.decoding import read_image
from framework.errors import ConfigurationError

Writer = Callable[..., Path]


def build(root: Path, **options: Any) -> DomainPairDataModule:
    defaults: dict[str, Any] = {
        "source": str(root / "source"),
        "target": str(root / "target"),
        "target_test": str(root / "target_test"),
        "batch_size": 4,
        "image_size": 16,
        "crop": "pad",
        "num_workers": 0,
    }
    return DomainPairDataModule(**{**defaults, **options})


def bytes_of(images: Tensor, data: DomainPairDataModule) -> list[bytes]:
    """Pixels of normalised images, one entry an image."""
    pixels = data.denormalize(images).mul(255).round().to(torch.uint8)
    return [image.numpy().tobytes() for image in pixels]


def files(folder: Path) -> dict[bytes, str]:
    """Path of each image below a folder by its pixels."""
    return {read_image(str(path)).numpy().tobytes(): str(path) for path in folder.rglob("*.png")}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches(domains: Path, recorder: Any, trainer: Any, workers: int) -> None:
    data = build(domains, crop="none", horizontal_flip=False, num_workers=workers, target_batch_size=6)
    trainer(max_epochs=3).fit(recorder, data)
    assert len(recorder.seen["train"]) == 27  # 36 source images: 9 batches an epoch
    source, target = files(domains / "source"), files(domains / "target")
    seen: list[str] = []
    for batch in recorder.seen["train"]:
        assert type(batch) is DomainBatch
        assert batch._fields == ("source", "target")
        assert batch.source.images.shape == (4, 3, 16, 16)
        assert batch.target.shape == (6, 3, 16, 16)
        for pixels, label in zip(bytes_of(batch.source.images, data), batch.source.labels.tolist(), strict=True):
            assert Path(source[pixels]).parent.name == ["ant", "bee", "cat"][label]
        seen += [target[pixels] for pixels in bytes_of(batch.target, data)]
    assert len(data.target_files) == 28
    for first in range(0, len(seen) - 28 + 1, 28):  # every pass over the target is complete
        assert sorted(seen[first : first + 28]) == sorted(data.target_files.paths)


def test_views_of_both_domains(domains: Path, recorder: Any, trainer: Any, make_recorder: Any) -> None:
    """The first view is the one that there would be alone; validation has images as ever."""
    one = make_recorder()
    trainer(max_epochs=1).fit(one, build(domains, steps_per_epoch=3))
    trainer(max_epochs=1).fit(recorder, build(domains, steps_per_epoch=3, views=2, target_batch_size=4))
    for single, several in zip(one.seen["train"], recorder.seen["train"], strict=True):
        assert several.source.images.shape == several.target.shape == (4, 2, 3, 16, 16)
        for alone, views in ((single.source.images, several.source.images), (single.target, several.target)):
            assert torch.equal(views[:, 0], alone)
            assert not torch.equal(views[:, 1], alone)
    for (_, ours), (_, theirs) in zip(one.seen["val"], recorder.seen["val"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_domains_are_paired_anew_in_each_pass(domains: Path, recorder: Any, trainer: Any) -> None:
    data = build(domains, target=str(domains / "source"), crop="none", horizontal_flip=False, val_fraction=0.0)
    trainer(max_epochs=2).fit(recorder, data)
    assert not any(torch.equal(batch.source.images, batch.target) for batch in recorder.seen["train"])


def poisoned(root: Path, copy: Path, arrangement: Callable[[int], str]) -> Path:
    """The same target files, in the same order, sorted into whatever folders."""
    shutil.copytree(root / "source", copy / "source")
    shutil.copytree(root / "target_test", copy / "target_test")
    for i, path in enumerate(sorted((root / "target").iterdir())):
        folder = copy / "target" / arrangement(i)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.name)
    return copy


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_of_the_target_change_nothing(
    domains: Path, tmp_path: Path, make_recorder: Any, trainer: Any, workers: int
) -> None:
    """Class folders with right names, wrong names, other classes or none: the batches are the same bit for bit."""
    ordered = sorted((domains / "target").iterdir())
    half = len(ordered) // 2
    arrangements: dict[str, Callable[[int], str]] = {
        "none": lambda i: "",
        "source's names": lambda i: "ant" if i < half else "bee",
        "swapped names": lambda i: "m_bee" if i < half else "z_ant",
        "other classes": lambda i: f"unknown/{i // 5:02}",
    }
    batches = {}
    for name, arrangement in arrangements.items():
        root = poisoned(domains, tmp_path / name, arrangement)
        recorder = make_recorder()
        trainer(max_epochs=2).fit(recorder, build(root, num_workers=workers))
        batches[name] = recorder.seen
    reference = batches.pop("none")
    for seen in batches.values():
        for ours, theirs in zip(reference["train"], seen["train"], strict=True):
            assert torch.equal(ours.source.images, theirs.source.images)
            assert torch.equal(ours.source.labels, theirs.source.labels)
            assert torch.equal(ours.target, theirs.target)
        for (_, ours), (_, theirs) in zip(reference["val"], seen["val"], strict=True):
            assert torch.equal(
                ours.images if isinstance(ours, LabelledBatch) else ours, getattr(theirs, "images", theirs)
            )


def test_training_draws_evaluation_does_not(domains: Path, recorder: Any, trainer: Any) -> None:
    data = build(domains)
    trainer(max_epochs=2).fit(recorder, data)
    original = files(domains / "source") | files(domains / "target")
    trained = [pixels for batch in recorder.seen["train"] for pixels in bytes_of(batch.target, data)]
    assert sum(pixels in original for pixels in trained) < len(trained) / 4
    for number, batch in recorder.seen["val"]:
        assert all(pixels in original for pixels in bytes_of(batch.images if number == 0 else batch, data))


def test_validation_holds_labelled_source_and_bare_target(domains: Path, recorder: Any, trainer: Any) -> None:
    data = build(domains, val_fraction=0.25)
    trainer(max_epochs=1).fit(recorder, data)
    source = [batch for number, batch in recorder.seen["val"] if number == 0]
    target = [batch for number, batch in recorder.seen["val"] if number == 1]
    assert all(type(batch) is LabelledBatch for batch in source)
    assert all(type(batch) is Tensor for batch in target)
    assert torch.bincount(torch.cat([batch.labels for batch in source])).tolist() == [3, 3, 3]
    assert sum(map(len, target)) == 8
    assert not set(data.source_files.paths) & set(data.source_val_files.paths)
    assert not set(data.target_files.paths) & set(data.target_val_files.paths)
    assert (len(data.source_files), len(data.target_files)) == (30, 23)


def test_folders_for_validation(domains: Path, recorder: Any, trainer: Any) -> None:
    test = str(domains / "target_test")
    data = build(domains, source_val=test, target_val=test)
    trainer(max_epochs=1).fit(recorder, data)
    assert (len(data.source_files), len(data.target_files)) == (39, 31)
    assert sum(len(batch.labels) for number, batch in recorder.seen["val"] if number == 0) == 15
    assert sum(len(batch) for number, batch in recorder.seen["val"] if number == 1) == 15
    assert data.target_val_files.labels == []


def test_without_a_validation_share(domains: Path, recorder: Any, trainer: Any, tmp_path: Path) -> None:
    data = build(domains, val_fraction=0.0)
    logger = CSVLogger(tmp_path)
    trainer(max_epochs=1, logger=logger).fit(recorder, data)
    assert data.source_val_files.paths == data.source_files.paths
    assert len(data.source_files) == 39
    original = files(domains / "source") | files(domains / "target")
    for number, batch in recorder.seen["val"]:
        assert all(pixels in original for pixels in bytes_of(batch.images if number == 0 else batch, data))
    assert not (Path(logger.log_dir) / "split.csv").exists()


def test_the_split_is_written(domains: Path, recorder: Any, trainer: Any, tmp_path: Path) -> None:
    data, logger = build(domains), CSVLogger(tmp_path)
    trainer(max_epochs=1, logger=logger).fit(recorder, data)
    with (Path(logger.log_dir) / "split.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("source", "target"):
        train, val = ({r["file"] for r in rows if r["split"] == f"{name}_{part}"} for part in ("train", "val"))
        assert not train & val
        assert train | val == {str(p.relative_to(domains / name)) for p in (domains / name).rglob("*.png")}
        used = getattr(data, f"{name}_files").paths
        assert {str(Path(path).relative_to(domains / name)) for path in used} == train


def test_test_and_predict(domains: Path, recorder: Any, trainer: Any) -> None:
    data = build(domains)
    run = trainer()
    run.test(recorder, data, verbose=False)
    assert torch.bincount(torch.cat([b.labels for b in recorder.seen["test"]])).tolist() == [5, 5, 5]
    original = files(domains / "target_test")
    tested = [pixels for batch in recorder.seen["test"] for pixels in bytes_of(batch.images, data)]
    assert {original[pixels] for pixels in tested} == set(original.values())  # as they are, each of them
    run.predict(recorder, data)
    paths = [path for batch in recorder.seen["predict"] for path in batch.paths]
    assert sorted(paths) == sorted(map(str, (domains / "target").iterdir()))
    recorder.seen["predict"].clear()
    run.predict(recorder, build(domains, predict=str(domains / "source" / "bee")))
    assert len([path for batch in recorder.seen["predict"] for path in batch.paths]) == 13


def test_the_target_folder_may_be_the_test(domains: Path, recorder: Any, trainer: Any) -> None:
    both = str(domains / "target_test")
    data = build(domains, target=both, target_test=both)
    trainer(max_epochs=1).fit(recorder, data)
    assert all(type(batch.target) is Tensor for batch in recorder.seen["train"])
    trainer().test(recorder, data, verbose=False)
    assert sum(len(batch.labels) for batch in recorder.seen["test"]) == 15


def test_different_steps_and_batches(domains: Path, recorder: Any, trainer: Any) -> None:
    trainer(max_epochs=2).fit(recorder, build(domains, steps_per_epoch=12, target_batch_size=2, eval_batch_size=3))
    assert len(recorder.seen["train"]) == 24
    assert {len(batch.target) for batch in recorder.seen["train"]} == {2}
    assert max(len(batch) for number, batch in recorder.seen["val"] if number == 1) == 3


@pytest.mark.parametrize(("limit", "expected"), [(2, 2), (0.5, 4)])
def test_limited_epochs(domains: Path, recorder: Any, trainer: Any, limit: Any, expected: int) -> None:
    run = trainer(max_epochs=3, limit_train_batches=limit)
    run.fit(recorder, build(domains))
    assert run.num_training_batches == expected  # of 9
    assert len(recorder.seen["train"]) == 3 * expected


def test_overfitting_a_few_batches(domains: Path, recorder: Any, trainer: Any) -> None:
    trainer(overfit_batches=2, max_epochs=2).fit(recorder, build(domains))
    batches = recorder.seen["train"]
    assert len(batches) == 4
    assert torch.equal(batches[0].source.images, batches[2].source.images)
    assert torch.equal(batches[1].target, batches[3].target)


def test_workers_change_nothing(domains: Path, make_recorder: Any, trainer: Any) -> None:
    seen = []
    for workers in (0, 2):
        recorder = make_recorder()
        torch.manual_seed(workers)
        trainer(max_epochs=3, limit_train_batches=3).fit(recorder, build(domains, num_workers=workers))
        seen.append(recorder.seen["train"])
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours.source.images, theirs.source.images)
        assert torch.equal(ours.source.labels, theirs.source.labels)
        assert torch.equal(ours.target, theirs.target)


def test_a_resumed_run_sees_the_rest(domains: Path, make_recorder: Any, trainer: Any, tmp_path: Path) -> None:
    whole, rest = make_recorder(), make_recorder()

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if len(whole.seen["train"]) == 13:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    trainer(max_epochs=3, callbacks=[Save()]).fit(whole, build(domains))
    trainer(max_epochs=3).fit(rest, build(domains, num_workers=2), ckpt_path=tmp_path / "run.ckpt")
    assert len(rest.seen["train"]) == 14
    for ours, theirs in zip(whole.seen["train"][13:], rest.seen["train"], strict=True):
        assert torch.equal(ours.source.images, theirs.source.images)
        assert torch.equal(ours.target, theirs.target)


# ---------------------------------------------------------------------- mistakes
def test_the_test_needs_labels(domains: Path, recorder: Any, trainer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Expected `--data.target_test` to be a labelled folder"):
        trainer().test(recorder, build(domains, target_test=None), verbose=False)


def test_other_classes_in_the_test_come_to_light_before_training(
    domains: Path, recorder: Any, trainer: Any, tmp_path: Path, images: Writer
) -> None:
    images(tmp_path, ["ant", "bee", "dog"])
    with pytest.raises(ConfigurationError, match=r"`--data.target_test` to hold the 3 classes .*'cat'.*'dog'"):
        trainer().fit(recorder, build(domains, target_test=str(tmp_path)))
    with pytest.raises(ConfigurationError, match=r"`--data.source_val` to hold the 3 classes"):
        trainer().fit(recorder, build(domains, source_val=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 37}, "`--data.source` to hold at least one batch, `--data.batch_size` = 37 images, but 36"),
        ({"batch_size": 29}, "`--data.target` to hold at least one batch, `--data.batch_size` = 29 images, but 28"),
        ({"target_batch_size": 29}, "`--data.target` to hold at least one batch, `--data.target_batch_size` = 29"),
        ({"source": "none"}, "`--data.source` to be a folder of images, but 'none' does not exist"),
        ({"target": "none"}, "`--data.target` to be a folder of images"),
        ({"target_val": "none"}, "`--data.target_val` to be a folder of images"),
    ],
)
def test_mistakes_name_the_flag(
    domains: Path, recorder: Any, trainer: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        trainer().fit(recorder, build(domains, **options))
    assert recorder.seen["train"] == []


def test_a_batch_of_nothing(domains: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`--data.target_batch_size` to be at least 1"):
        build(domains, target_batch_size=0)
