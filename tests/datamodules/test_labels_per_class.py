"""A few labelled images of each class: how many, which, and what a run says of it."""

from __future__ import annotations

import csv
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from framework.__main__ import main
from framework.datamodules import DomainPairDataModule, ImageFolderDataModule
from framework.datamodules.folders import few_of_each_class, joined, labelled_images
from framework.errors import ConfigurationError

Writer = Callable[..., Path]
CLASSES = ["ant", "bee", "cat"]
SMALL: dict[str, Any] = {"batch_size": 3, "image_size": 16, "crop": "none", "num_workers": 0}


def folder(root: Path, **options: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(str(root), **{**SMALL, **options})
    data.setup("fit")
    return data


def pair(source: Any, target: Path, **options: Any) -> DomainPairDataModule:
    data = DomainPairDataModule(source, str(target), **{**SMALL, **options})
    data.setup("fit")
    return data


@pytest.fixture
def uneven(tmp_path: Path, images: Writer) -> Path:
    """Of the classes 10, 20 and 40 images."""
    for seed, name in enumerate(CLASSES):
        images(tmp_path / "data", [name], count=10 * 2**seed, seed=seed)
    return tmp_path / "data"


def counts(labels: list[int]) -> list[int]:
    return [labels.count(label) for label in range(max(labels) + 1)]


def split(run: Path) -> dict[str, set[str]]:
    with (run / "split.csv").open(newline="") as file:
        rows = [(row["split"], row["file"]) for row in csv.DictReader(file)]
    return {name: {file for split, file in rows if split == name} for name in {split for split, _ in rows}}


# ---------------------------------------------------------------------- which images
@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (None, [7, 14, 28]),
        (1, [1, 1, 1]),
        (5, [5, 5, 5]),
        (1.0, [7, 14, 28]),
        (0.5, [4, 7, 14]),  # round(3.5) is 4, to the even number
        (0.15, [1, 2, 4]),
        (0.01, [1, 1, 1]),
    ],
)
def test_how_many_of_each_class(uneven: Path, amount: int | float | None, expected: list[int]) -> None:
    data, everything = folder(uneven, labels_per_class=amount), folder(uneven)
    assert counts(data.train_files.labels) == expected
    # validation and test are untouched
    assert data.val_files == everything.val_files
    assert data.test_files == everything.test_files
    assert set(data.train_files.paths) <= set(everything.train_files.paths)
    assert all(CLASSES[label] == Path(path).parent.name for path, label in files(data))
    assert len(data.train_dataloader()) == sum(expected) // 3
    batches = torch.cat([batch.labels for batch in data.train_dataloader()])
    assert len(batches) == sum(expected) // 3 * 3
    assert sum(len(batch.labels) for batch in data.unaugmented_train_dataloader()) == sum(expected)


def files(data: ImageFolderDataModule) -> Any:
    return zip(data.train_files.paths, data.train_files.labels, strict=True)


def test_smaller_choices_are_part_of_larger_ones(uneven: Path) -> None:
    chosen = [set(folder(uneven, labels_per_class=amount).train_files.paths) for amount in (1, 2, 3, 7)]
    assert all(a < b for a, b in pairwise(chosen))
    shares = [set(folder(uneven, labels_per_class=share).train_files.paths) for share in (0.1, 0.15, 0.3, 0.5, 1.0)]
    assert all(a < b for a, b in pairwise(shares))
    assert chosen[0] < shares[1]


def test_the_choice_is_the_seeds(uneven: Path) -> None:
    def choice(seed: int) -> list[str]:
        return folder(uneven, labels_per_class=2, seed=seed, val_fraction=0.0, test_fraction=0.0).train_files.paths

    assert choice(1) == choice(1)
    assert choice(1) != choice(2)
    # at random: over many seeds every image of a class is chosen about as often
    drawn: Counter[str] = Counter()
    every = labelled_images(uneven, "--data.root")
    for seed in range(400):
        drawn.update(every.paths[i] for i in few_of_each_class(every, 2, seed, "x")[0])
    assert {Path(path).parent.name for path in drawn} == set(CLASSES)
    for seed, name in enumerate(CLASSES):
        expected = 2 * 400 / (10 * 2**seed)
        often = [count for path, count in drawn.items() if Path(path).parent.name == name]
        assert len(often) == 10 * 2**seed
        assert max(abs(count - expected) for count in often) < 5 * expected**0.5


def test_without_validation_images_the_used_ones_are_looked_at(uneven: Path, tmp_path: Path) -> None:
    data = folder(uneven, labels_per_class=2, val_fraction=0.0)
    assert data.val_files.paths == data.train_files.paths
    data = pair(str(uneven), uneven, labels_per_class=2, val_fraction=0.0)  # type: ignore[assignment]
    assert data.source_val_files.paths == data.source_files.paths  # type: ignore[attr-defined]


def test_folders_for_the_parts(tmp_path: Path, images: Writer) -> None:
    for seed, name in enumerate(("train", "val", "test")):
        images(tmp_path / name, CLASSES, count=(8, 3, 5)[seed], seed=seed)
    data = folder(tmp_path, labels_per_class=2)
    assert (len(data.train_files), len(data.val_files), len(data.test_files)) == (6, 9, 15)


def test_each_source_folder_by_itself(tmp_path: Path, images: Writer) -> None:
    images(tmp_path / "a", CLASSES, count=10, seed=1)
    images(tmp_path / "b", CLASSES, count=20, seed=2)
    images(tmp_path / "t", None, count=12, seed=3)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    everything = pair(folders, tmp_path / "t", batch_size=4)
    for amount, expected in ((2, {0: [2, 2, 2], 1: [2, 2, 2]}), (0.3, {0: [3, 3, 3], 1: [5, 5, 5]})):
        data = pair(folders, tmp_path / "t", batch_size=4, labels_per_class=amount)
        for domain, numbers in expected.items():
            own = [
                label
                for label, d in zip(data.source_files.labels, data.source_files.domains, strict=True)
                if d == domain
            ]
            assert counts(own) == numbers
        assert data.source_val_files == everything.source_val_files
        assert data.target_files == everything.target_files
        assert data.target_val_files == everything.target_val_files
        assert data._steps(len(data.source_files)) == sum(map(sum, expected.values())) // 4
    # whatever their order
    turned = pair(folders[::-1], tmp_path / "t", batch_size=4, labels_per_class=2)
    straight = pair(folders, tmp_path / "t", batch_size=4, labels_per_class=2)
    assert set(turned.source_files.paths) == set(straight.source_files.paths)
    tables = [data._split_table(labelled=True) for data in (turned, straight)]
    assert tables[0] == tables[1]
    assert tables[0].count("source_train,") == 12


def test_validation_folders_of_a_pair_are_untouched(tmp_path: Path, images: Writer) -> None:
    images(tmp_path / "a", CLASSES, count=10, seed=1)
    images(tmp_path / "t", None, count=12, seed=3)
    a = str(tmp_path / "a")
    data = pair(a, tmp_path / "t", labels_per_class=2, source_val=a)  # the folder itself: all of it, as was asked
    assert len(data.source_files) == 6
    assert len(data.source_val_files) == 30
    assert "source_val" not in data._split_table(labelled=True)


def test_indices(tmp_path: Path, images: Writer) -> None:
    images(tmp_path / "a", CLASSES, count=3)
    images(tmp_path / "b", CLASSES, count=2)
    both = joined([labelled_images(tmp_path / name, "x") for name in "ab"])
    chosen, others = few_of_each_class(both, 1, 0, "x")
    assert sorted(chosen + others) == list(range(15))
    assert chosen == sorted(chosen)
    assert Counter((both.domains[i], both.labels[i]) for i in chosen) == {(d, k): 1 for d in range(2) for k in range(3)}


# ---------------------------------------------------------------------- what a run says of it
def test_the_manifest_says_what_was_used(uneven: Path, tmp_path: Path, recorder: Any, trainer: Any) -> None:
    data = ImageFolderDataModule(str(uneven), **SMALL, labels_per_class=3, seed=1)
    logger = CSVLogger(tmp_path / "logs")
    trainer(max_epochs=1, logger=logger).fit(recorder, data)
    written = split(Path(logger.log_dir))
    assert {name: len(found) for name, found in written.items()} == {"train": 9, "unused": 40, "val": 7, "test": 14}
    assert set.union(*written.values()) == {path.relative_to(uneven).as_posix() for path in uneven.rglob("*.png")}
    assert sum(map(len, written.values())) == 70
    assert written["train"] == {Path(path).relative_to(uneven).as_posix() for path in data.train_files.paths}
    assert len(recorder.seen["train"]) == 3  # 9 images, 3 a batch


def test_parts_in_folders_have_a_manifest_too(tmp_path: Path, images: Writer, recorder: Any, trainer: Any) -> None:
    for seed, name in enumerate(("train", "val", "test")):
        images(tmp_path / "data" / name, CLASSES, count=4, seed=seed)
    logger = CSVLogger(tmp_path / "logs")
    data = ImageFolderDataModule(str(tmp_path / "data"), **SMALL, labels_per_class=1)
    trainer(max_epochs=1, logger=logger).fit(recorder, data)
    written = split(Path(logger.log_dir))
    assert {name: len(found) for name, found in written.items()} == {"train": 3, "unused": 9}


def test_without_validation_images_the_manifest_is_what_was_looked_at(
    uneven: Path, tmp_path: Path, recorder: Any, trainer: Any
) -> None:
    logger = CSVLogger(tmp_path / "logs")
    data = ImageFolderDataModule(str(uneven), **SMALL, labels_per_class=1, val_fraction=0.0)
    trainer(max_epochs=1, logger=logger).fit(recorder, data)
    written = split(Path(logger.log_dir))
    assert written["val"] == written["train"]
    assert len(written["train"]) == 3


@pytest.mark.parametrize("kind", ["folder", "pair"])
def test_another_run_of_it(kind: str, uneven: Path, tmp_path: Path, make_recorder: Any, trainer: Any) -> None:
    """A test knows its split again, with the number or without; to go on with another number is refused."""

    def build(labels: int | float | None, **options: Any) -> Any:
        if kind == "folder":
            return ImageFolderDataModule(str(uneven), **SMALL, labels_per_class=labels, **options)
        folders = {"source": str(uneven), "target": str(uneven), "target_test": str(uneven)}
        return DomainPairDataModule(**folders, **SMALL, labels_per_class=labels, **options)

    path = tmp_path / "run.ckpt"
    run = trainer(max_epochs=1)
    run.fit(make_recorder(), build(1))
    run.save_checkpoint(path)
    trainer(max_epochs=2).fit(make_recorder(), build(1), ckpt_path=path)
    for labels in (1, None, 2):
        for function in (trainer().test, trainer().validate):
            function(make_recorder(), build(labels), ckpt_path=path, verbose=False)
    for labels, got in ((2, "2"), (1.0, r"1\.0"), (None, "null")):
        with pytest.raises(ConfigurationError, match=f"Expected `--data.labels_per_class 1`, as in .*, but got {got}:"):
            trainer(max_epochs=2).fit(make_recorder(), build(labels), ckpt_path=path)
    with pytest.raises(ConfigurationError, match="Expected the split of the run"):
        trainer().validate(make_recorder(), build(1, val_fraction=0.2), ckpt_path=path, verbose=False)
    run = trainer(max_epochs=1)
    run.fit(make_recorder(), build(None))
    run.save_checkpoint(path)
    with pytest.raises(ConfigurationError, match=r"`--data.labels_per_class null`, as in .*, but got 0\.5:"):
        trainer(max_epochs=2).fit(make_recorder(), build(0.5), ckpt_path=path)
    # a checkpoint from before there was the option
    older = torch.load(path, weights_only=True)
    del older[type(build(None)).__qualname__]["labels_per_class"]
    torch.save(older, path)
    trainer(max_epochs=2).fit(make_recorder(), build(None), ckpt_path=path)


def test_new_training_images_are_noticed_where_parts_are_folders(
    tmp_path: Path, images: Writer, make_recorder: Any, trainer: Any
) -> None:
    """The choice would be another one."""
    for seed, name in enumerate(("train", "val", "test")):
        images(tmp_path / "data" / name, CLASSES, count=6, seed=seed)
    data = ImageFolderDataModule(str(tmp_path / "data"), **SMALL, labels_per_class=2)
    run = trainer(max_epochs=1)
    run.fit(make_recorder(), data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    shutil.copy(tmp_path / "data/train/bee/0.png", tmp_path / "data/train/bee/6.png")
    again = ImageFolderDataModule(str(tmp_path / "data"), **SMALL, labels_per_class=2)
    with pytest.raises(ConfigurationError, match="Expected the split of the run"):
        trainer(max_epochs=2).fit(make_recorder(), again, ckpt_path=tmp_path / "run.ckpt")
    trainer().test(make_recorder(), again, ckpt_path=tmp_path / "run.ckpt", verbose=False)  # the test images are there


# ---------------------------------------------------------------------- the command line, mistakes
def test_from_the_shell(uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = (
        "fit --model ResidualClassifier --model.backbone resnet8 --data ImageFolderDataModule --data.root {root} "
        "--data.image_size 16 --data.crop none --data.num_workers 0 --data.batch_size 3 --trainer.max_epochs 1 "
        "--trainer.accelerator cpu --trainer.enable_progress_bar false --data.labels_per_class {labels}"
    )
    for version, (labels, expected) in enumerate((("1", 3), ("1.0", 49), ("0.15", 7), ("null", 49))):
        assert main(shlex.split(line.format(root=uneven, labels=labels))) == 0
        run = Path(f"lightning_logs/default/version_{version}")
        assert len(split(run)["train"]) == expected
        written = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["labels_per_class"]
        assert repr(written) == {"null": "None"}.get(labels, labels)
    assert main(shlex.split("fit --run lightning_logs/default/version_0 --trainer.max_epochs 2")) == 0
    assert main(shlex.split("test --run lightning_logs/default/version_0")) == 0


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.5, -0.5, True, float("nan")])
def test_amounts_out_of_range(tmp_path: Path, amount: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`--data.labels_per_class` to be a whole number from 1 on, or a"):
        ImageFolderDataModule(str(tmp_path), labels_per_class=amount)


def test_more_than_a_class_has(uneven: Path) -> None:
    message = r"`--data.labels_per_class` to be no more than a class has training images, but got 8, and 'ant' has 7"
    with pytest.raises(ConfigurationError, match=message):
        folder(uneven, labels_per_class=8)
    with pytest.raises(ConfigurationError, match=r"but got 10, and 'ant' has 9 under"):
        pair(str(uneven), uneven, labels_per_class=10)


def test_less_than_a_batch(uneven: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"but 3 training .* `--data.batch_size` or raise `--data.labels_per_"):
        folder(uneven, labels_per_class=1, batch_size=4)
    with pytest.raises(ConfigurationError, match=r"`--data.target` .*Lower `--data.target_batch_size` or `--data.val_"):
        pair(str(uneven), uneven, labels_per_class=1, target_batch_size=99)
