"""Images alone, of one folder or several: equal shares, the same validation every time, no label anywhere."""

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

from framework.batch import UnlabelledBatch
from framework.datamodules import DomainPairDataModule, ImageFolderDataModule, UnlabelledFolderDataModule
from framework.datamodules.decoding import read_image
from framework.errors import ConfigurationError
from framework.modules import ResidualClassifier, RotationPrediction, SourceOnly

Writer = Callable[..., Path]
SIZES = {"a": 26, "b": 8, "c": 17}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, images: Writer) -> Path:
    """Three folders of different sizes: without class folders, with some, and with some inside others."""
    folder = tmp_path_factory.mktemp("unlabelled")
    images(folder / "a", None, count=26, seed=1)
    images(folder / "b", ["ant", "bee"], count=4, seed=2)
    images(folder / "c" / "deep" / "down", None, count=9, seed=3)
    images(folder / "c", ["x"], count=8, seed=4)
    return folder


def build(root: Path, names: str = "abc", **options: Any) -> UnlabelledFolderDataModule:
    defaults: dict[str, Any] = {"batch_size": 6, "image_size": 16, "crop": "pad", "num_workers": 0}
    given = [str(root / name) for name in names]
    return UnlabelledFolderDataModule(given[0] if len(given) == 1 else given, **{**defaults, **options})


def plain(root: Path, names: str = "abc", **options: Any) -> UnlabelledFolderDataModule:
    """Images that are not augmented."""
    return build(root, names, **{"crop": "none", "horizontal_flip": False, **options})


def known(root: Path) -> dict[bytes, Path]:
    """The path of each image by its pixels."""
    return {read_image(str(path)).numpy().tobytes(): path for path in root.rglob("*.png")}


def paths(images: Tensor, data: UnlabelledFolderDataModule, known: dict[bytes, Path]) -> list[Path]:
    """Where images that were not augmented are from."""
    pixels = data.denormalize(images).mul(255).round().to(torch.uint8)
    return [known[image.numpy().tobytes()] for image in pixels]


def below(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0]


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_holds_equally_many_of_each(root: Path, recorder: Any, trainer: Any, workers: int) -> None:
    data = plain(root, num_workers=workers, val_fraction=0.0)
    trainer(max_epochs=4).fit(recorder, data)
    assert len(recorder.seen["train"]) == 4 * (51 // 6)  # an epoch: as many images as all folders together
    files, seen = known(root), []
    for batch in recorder.seen["train"]:
        assert type(batch) is UnlabelledBatch
        assert batch._fields == ("images",)
        assert (batch.images.shape, batch.images.dtype) == ((6, 3, 16, 16), torch.float32)
        found = paths(batch.images, data, files)
        assert [below(path, root) for path in found] == ["a", "b", "c"] * 2  # image i is of folder i % 3
        seen += found
    assert set(recorder.arrived) == {torch.uint8}  # pixels travel as bytes
    for folder, size in enumerate(SIZES.values()):  # each passes through its images, whatever its size
        own = seen[folder::3]
        passes = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(passes) == 64 // size
        assert all(len(set(images)) == size for images in passes)


def test_one_folder_in_a_list_is_one_folder(root: Path) -> None:
    seen = []
    for folders in (str(root / "a"), [str(root / "a")]):
        data = UnlabelledFolderDataModule(folders, batch_size=4, image_size=16, num_workers=0)
        data.setup("fit")
        images = torch.cat([batch.images for batch in data.train_dataloader()])
        seen.append((images, data._split_table(), data.state_dict()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1:] == seen[1][1:]
    assert "folders" not in seen[0][2]


def test_it_is_the_stream_of_the_target(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same images in the same order as the unlabelled side of a pair, but for the number of its stream."""
    pair = DomainPairDataModule(
        str(root / "b"), str(root / "a"), batch_size=4, image_size=16, num_workers=0, steps_per_epoch=3
    )
    pair.setup("fit")
    targets = [batch.target for batch, *_ in pair.train_dataloader()]
    data = build(root, "a", batch_size=4, crop="random_resized", steps_per_epoch=3)
    monkeypatch.setattr(data, "_stream_seed", lambda stream: 16 * data.seed + stream + 1)
    data.setup("fit")
    assert all(torch.equal(a.images, b) for a, b in zip(data.train_dataloader(), targets, strict=True))


def test_workers_change_nothing(root: Path, make_recorder: Any, trainer: Any) -> None:
    seen = []
    for workers in (0, 2):
        recorder = make_recorder()
        torch.manual_seed(workers)
        data = build(root, num_workers=workers, views=2, color_jitter=0.5, grayscale=0.2, blur=0.5)
        trainer(max_epochs=2, limit_train_batches=4).fit(recorder, data)
        seen.append(recorder.seen)
    assert len(seen[0]["train"]) == 8
    assert all(torch.equal(a.images, b.images) for a, b in zip(*(s["train"] for s in seen), strict=True))
    assert all(torch.equal(a.images, b.images) for (_, a), (_, b) in zip(*(s["val"] for s in seen), strict=True))


@pytest.mark.parametrize("options", [{}, {"views": 2, "color_jitter": 0.5, "grayscale": 0.2, "blur": 0.5}])
@pytest.mark.parametrize("stop", [5, 9])
def test_a_resumed_run_sees_the_rest(
    root: Path, make_recorder: Any, trainer: Any, tmp_path: Path, stop: int, options: dict[str, Any]
) -> None:
    whole, rest = make_recorder(), make_recorder()

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if len(whole.seen["train"]) == stop:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    trainer(max_epochs=2, callbacks=[Save()]).fit(whole, build(root, **options))
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["UnlabelledFolderDataModule"]
    assert state["folders"] == [str(root / name) for name in "abc"]
    assert state["batches"] == stop
    trainer(max_epochs=2).fit(rest, build(root, num_workers=1, **options), ckpt_path=tmp_path / "run.ckpt")
    assert len(rest.seen["train"]) == 14 - stop
    expected = [batch.images for batch in whole.seen["train"][stop:]]
    assert all(torch.equal(a, b.images) for a, b in zip(expected, rest.seen["train"], strict=True))
    images = torch.cat(expected)
    assert len({image.numpy().tobytes() for image in images.flatten(0, -4)}) > 0.9 * len(images.flatten(0, -4))


def at(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(UnlabelledFolderDataModule, "_rank", rank)
    monkeypatch.setattr(UnlabelledFolderDataModule, "_world_size", world)


def test_two_ranks_take_the_batch_of_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 processes with 3 images are 1 with 6: the same images with the same augmentations, in the same order."""

    def batches(batch_size: int, rank: int, world: int) -> list[Tensor]:
        at(monkeypatch, rank, world)
        data = build(root, batch_size=batch_size, steps_per_epoch=4, views=2)
        data.setup("fit")
        return [batch.images for batch in data.train_dataloader()]

    one, first, second = batches(6, 0, 1), batches(3, 0, 2), batches(3, 1, 2)
    assert len(one) == 4
    assert all(torch.equal(whole, torch.cat(parts)) for whole, *parts in zip(one, first, second, strict=True))


def test_views_are_normalised_one_like_the_other(root: Path) -> None:
    data = build(root, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    batch = data.on_after_batch_transfer(UnlabelledBatch(pixels), 0)
    assert type(batch) is UnlabelledBatch
    for channel, (mean, std) in enumerate(zip(data.mean, data.std, strict=True)):
        expected = (pixels[:, :, channel].double() / 255 - mean) / std
        torch.testing.assert_close(batch.images[:, :, channel].double(), expected, rtol=1e-5, atol=1e-5)
    one = data.on_after_batch_transfer(UnlabelledBatch(pixels[:, 1]), 0)
    assert torch.equal(one.images, batch.images[:, 1])


def test_overfitting_takes_images_of_each(root: Path, recorder: Any, trainer: Any) -> None:
    data = plain(root)
    trainer(overfit_batches=2, max_epochs=2).fit(recorder, data)
    files = known(root)
    for batch in recorder.seen["train"]:
        assert [below(path, root) for path in paths(batch.images, data, files)] == ["a", "b", "c"] * 2


# ---------------------------------------------------------------------- validation
def test_each_folder_is_split_by_itself(root: Path, recorder: Any, trainer: Any, tmp_path: Path) -> None:
    held_out = []
    for names in ("a", "abc", "cba"):
        data = build(root, names, val_fraction=0.25)
        data.setup("fit")
        counts = {name: sum(below(Path(p), root) == name for p in data.val_files.paths) for name in names}
        assert counts == {name: {"a": 6, "b": 2, "c": 4}[name] for name in names}
        assert not set(data.train_files.paths) & set(data.val_files.paths)
        assert len(data.train_files) + len(data.val_files) == sum(SIZES[name] for name in names)
        held_out.append({path for path in data.val_files.paths if below(Path(path), root) == "a"})
    assert held_out[0] == held_out[1] == held_out[2]

    logger = CSVLogger(tmp_path)
    trainer(max_epochs=1, limit_train_batches=1, logger=logger).fit(recorder, data)
    with (Path(logger.log_dir) / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for part, files in (("train", data.train_files), ("val", data.val_files)):
        listed = {str(Path(row["folder"]) / row["file"]) for row in rows if row["split"] == part}
        assert listed == set(files.paths)
    assert {row["split"] for row in rows} == {"train", "val"}


def test_another_seed_holds_out_others(root: Path) -> None:
    held_out = []
    for seed in (0, 1):
        data = build(root, seed=seed)
        data.setup("fit")
        held_out.append(data.val_files.paths)
    assert held_out[0] != held_out[1]


def test_one_view_is_validated_without_augmentation(root: Path, recorder: Any, trainer: Any) -> None:
    data = build(root, color_jitter=1.0, val_fraction=0.25)
    trainer(max_epochs=1).fit(recorder, data)
    batches = [batch for _, batch in recorder.seen["val"]]
    assert all(type(batch) is UnlabelledBatch for batch in batches)
    found = [str(path) for batch in batches for path in paths(batch.images, data, known(root))]
    assert sorted(found) == sorted(data.val_files.paths)


def test_without_a_split_the_training_images_are_validated(root: Path, recorder: Any, trainer: Any) -> None:
    data = build(root, val_fraction=0.0)
    trainer(max_epochs=1).validate(recorder, data, verbose=False)
    assert sum(len(batch.images) for _, batch in recorder.seen["val"]) == 51


@pytest.mark.parametrize("workers", [0, 2])
def test_every_validation_sees_the_same_views(root: Path, recorder: Any, trainer: Any, workers: int) -> None:
    data = build(root, views=2, val_fraction=0.25, color_jitter=0.5, num_workers=workers, eval_batch_size=5)
    trainer(max_epochs=3).fit(recorder, data)
    batches = [batch.images for _, batch in recorder.seen["val"]]
    assert [images.shape for images in batches[:3]] == [(5, 2, 3, 16, 16), (5, 2, 3, 16, 16), (2, 2, 3, 16, 16)]
    passes = [torch.cat(batches[start : start + 3]) for start in (0, 3, 6)]
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[0], passes[2])
    assert len({view.numpy().tobytes() for view in passes[0].flatten(0, 1)}) == 24  # no two views are the same
    trained = {view.numpy().tobytes() for batch in recorder.seen["train"] for view in batch.images.flatten(0, 1)}
    assert len(trained) == 3 * 6 * 6 * 2


def test_validation_draws_from_a_stream_of_its_own(root: Path) -> None:
    """Where validation is on the training images, its views of an image are not those of training."""
    data = build(root, "a", views=2, val_fraction=0.0, batch_size=26)
    data.setup("fit")
    (trained,) = (batch.images for batch in data.train_dataloader())
    (validated,) = (batch.images for batch in data.val_dataloader())
    assert trained.shape == validated.shape
    views = [{view.numpy().tobytes() for view in images.flatten(0, 1)} for images in (trained, validated)]
    assert not views[0] & views[1]


def test_validation_leaves_the_runs_random_numbers_alone(root: Path) -> None:
    data = build(root, views=2)
    data.setup("fit")
    state = torch.get_rng_state()
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("views", [1, 2])
def test_ranks_share_the_validation(root: Path, monkeypatch: pytest.MonkeyPatch, views: int) -> None:
    def validated(rank: int, world: int) -> Tensor:
        at(monkeypatch, rank, world)
        data = build(root, views=views, batch_size=3, val_fraction=0.3)
        data.setup("fit")
        return torch.cat([batch.images for batch in data.val_dataloader()])

    whole, *parts = validated(0, 1), validated(0, 2), validated(1, 2)
    assert len(whole) == 15
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[rank::2])


# ---------------------------------------------------------------------- no label
@pytest.mark.parametrize("views", [1, 2])
def test_class_folders_change_nothing(root: Path, tmp_path: Path, make_recorder: Any, trainer: Any, views: int) -> None:
    """Class folders with right names, wrong names, of other sizes, or none: the batches are the same bit for bit."""
    ordered = sorted((root / "a").iterdir())
    arrangements: dict[str, Callable[[int], str]] = {
        "none": lambda i: "",
        "two": lambda i: "ant" if i < 13 else "bee",
        "renamed": lambda i: "m_bee" if i < 13 else "z_ant",
        "shuffled": lambda i: "ant" if i < 4 else "bee",
        "deep": lambda i: f"unknown/{i // 5:02}",
    }
    seen = {}
    for name, arrangement in arrangements.items():
        for i, path in enumerate(ordered):
            folder = tmp_path / name / "a" / arrangement(i)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.name)
        shutil.copytree(root / "b", tmp_path / name / "b")
        recorder = make_recorder()
        trainer(max_epochs=2).fit(recorder, build(tmp_path / name, "ab", views=views))
        seen[name] = [*recorder.seen["train"], *(batch for _, batch in recorder.seen["val"])]
    reference = seen.pop("none")
    for batches in seen.values():
        assert all(torch.equal(a.images, b.images) for a, b in zip(reference, batches, strict=True))


def test_it_knows_no_classes(root: Path) -> None:
    for names in ("b", "abc"):
        data = build(root, names)
        data.setup("fit")
        for attribute in ("class_names", "num_classes"):
            assert not hasattr(data, attribute)
        assert (data.train_files.labels, data.train_files.classes) == ([], [])
        assert (data.val_files.labels, data.val_files.classes) == ([], [])


def test_no_labels_to_choose_by(root: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no `--data.labels_per_class` with Unlabelled.*, but got 3. Remove"):
        build(root, labels_per_class=3)


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "`--data.folders` to name a folder or several, but got an empty list"),
        (["{r}/a", "{r}/b", "{r}/a"], "`--data.folders` to name each folder once, but got '.*/a' twice"),
        (["{r}/a", "{r}/b/../a"], "to name each folder once, but got '.*/b/../a', which is '.*/a' again"),
        (
            ["{r}/a", "{r}/b", "{r}/c", "{r}/d"],
            "`--data.batch_size` to be a multiple of 4, the folders of `--data.folders`, .* got 6. Take 4 or 8",
        ),
    ],
)
def test_lists_that_cannot_be(root: Path, given: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        UnlabelledFolderDataModule([folder.format(r=root) for folder in given], batch_size=6)


def test_folders_that_cannot_be(root: Path, tmp_path: Path, recorder: Any, trainer: Any) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(root / "b", tmp_path / "corrupt")
    (tmp_path / "corrupt" / "bee" / "3.png").write_bytes(b"no image")
    for name, message in (
        ("missing", f"`--data.folders` to be a folder of images, but '{tmp_path}/missing' does not exist"),
        ("empty", f"`--data.folders` to hold images, but found none under '{tmp_path}/empty'"),
        ("corrupt", f"every file of `--data.folders` .* 1 of 8 cannot: '{tmp_path}/corrupt/bee/3.png'"),
    ):
        folders = [str(root / "a"), str(tmp_path / name)]
        with pytest.raises(ConfigurationError, match=message):
            trainer().fit(recorder, UnlabelledFolderDataModule(folders, batch_size=6, num_workers=0, image_size=16))


def test_each_folder_holds_its_share(root: Path, recorder: Any, trainer: Any) -> None:
    message = rf"folder of `--data.folders` .* 9 of `--data.batch_size` = 18 images, but 8 .* under '{root}/b'"
    with pytest.raises(ConfigurationError, match=message):
        trainer().fit(recorder, build(root, "ab", batch_size=18, val_fraction=0.0))
    trainer(max_epochs=1).fit(recorder, build(root, "ab", batch_size=16, val_fraction=0.0))


def checkpoint(root: Path, recorder: Any, trainer: Any, path: Path, names: str) -> Path:
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(recorder, build(root, names))
    run.save_checkpoint(path)
    return path


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("a", "ab", "`--data.folders` to name as many folders as in the run of the checkpoint, 1, but got 2"),
        ("ab", "a", "as many folders as in the run of the checkpoint, 2, but got 1"),
        ("ab", "ba", r"in the order of the checkpoint's run, '\[.*/a, .*/b\]', but got them in another"),
    ],
)
def test_other_folders_cannot_resume(
    root: Path, make_recorder: Any, trainer: Any, tmp_path: Path, before: str, after: str, message: str
) -> None:
    saved = checkpoint(root, make_recorder(), trainer, tmp_path / "run.ckpt", before)
    recorder = make_recorder()
    with pytest.raises(ConfigurationError, match=f"Expected .*{message}"):
        trainer(max_epochs=2).fit(recorder, build(root, after), ckpt_path=saved)
    assert recorder.seen["train"] == []
    trainer().validate(recorder, build(root, before), ckpt_path=saved, verbose=False)


def test_a_changed_folder_is_refused(
    root: Path, make_recorder: Any, trainer: Any, tmp_path: Path, images: Writer
) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    saved = checkpoint(copy, make_recorder(), trainer, tmp_path / "run.ckpt", "ab")
    images(copy / "b", ["ant"], count=5)
    with pytest.raises(ConfigurationError, match=rf"'{copy}/a' and '{copy}/b'"):
        trainer(max_epochs=2).fit(make_recorder(), build(copy, "ab"), ckpt_path=saved)


def test_the_checkpoint_rebuilds_it(root: Path, recorder: Any, trainer: Any, tmp_path: Path) -> None:
    saved = checkpoint(root, recorder, trainer, tmp_path / "run.ckpt", "abc")
    again = UnlabelledFolderDataModule.load_from_checkpoint(saved)
    assert again.folders == [str(root / name) for name in "abc"]
    # one of before views and augmentations were options of every datamodule
    content = torch.load(saved, weights_only=True)
    for name in ("views", "crop_scale", "color_jitter", "grayscale", "blur"):
        del content["datamodule_hyper_parameters"][name]
    torch.save(content, saved)
    old = UnlabelledFolderDataModule.load_from_checkpoint(saved)
    assert (old.views, old.crop_scale, old.color_jitter, old.grayscale, old.blur) == (1, (0.08, 1.0), 0.0, 0.0, 0.0)


@pytest.mark.parametrize("command", ["test", "predict"])
def test_there_is_nothing_to_test(root: Path, recorder: Any, trainer: Any, command: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"what `{command}` needs, but UnlabelledFolderDataModule serves"):
        getattr(trainer(), command)(recorder, build(root))


def test_modules_of_other_batches_refuse_it(root: Path, images: Writer, tmp_path: Path, trainer: Any) -> None:
    folder = str(images(tmp_path / "labelled", ["ant", "bee"], count=8))
    options: dict[str, Any] = {"batch_size": 2, "image_size": 16, "num_workers": 0}
    one, pair = ImageFolderDataModule(folder, **options), DomainPairDataModule(folder, folder, **options)
    for module, data, message in (
        (ResidualClassifier(2, backbone="resnet8"), build(root), "LabelledBatch.*an Unl.*Take `--data ImageFolderD"),
        (SourceOnly(2, backbone="resnet8"), build(root), "DomainBatch.*an Unlabelled.*Take `--data DomainPairDa"),
        (RotationPrediction(backbone="resnet8"), one, "an UnlabelledBatch.*a Lab.*Take `--data UnlabelledFolderD"),
        (RotationPrediction(backbone="resnet8"), pair, "an UnlabelledBatch.*a Dom.*Take `--data UnlabelledFolderD"),
        (RotationPrediction(backbone="resnet8"), build(root, views=2), "`--data.views` to be 1, .* but got 2"),
    ):
        for command in ("fit", "validate"):
            with pytest.raises(ConfigurationError, match=message):
                getattr(trainer(), command)(module, data)
    with pytest.raises(ConfigurationError, match="a classifier to `predict`, but RotationPrediction knows no classes"):
        trainer().predict(RotationPrediction(backbone="resnet8"), one)
