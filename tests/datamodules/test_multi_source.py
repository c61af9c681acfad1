"""Several source folders: balanced batches, a stream for each domain, and the domain of each image on its way."""

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
from framework.datamodules.streams import StreamSampler
from framework.errors import ConfigurationError

Writer = Callable[..., Path]
CLASSES = ["ant", "bee", "cat"]
SIZES = (13, 7, 10)  # images a class of the three folders


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, images: Writer) -> Path:
    """Source folders ``a``, ``b``, ``c`` of different sizes and equal file names, and a ``target``."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, (name, count) in enumerate(zip("abc", SIZES, strict=True)):
        images(folder / name, CLASSES, count=count, seed=seed)
    images(folder / "target", None, count=40, seed=9)
    return folder


def build(root: Path, sources: str = "abc", **options: Any) -> DomainPairDataModule:
    defaults: dict[str, Any] = {"batch_size": 6, "image_size": 16, "crop": "pad", "num_workers": 0}
    given = [str(root / name) for name in sources]
    target = str(root / "target")
    return DomainPairDataModule(given[0] if len(given) == 1 else given, target, **{**defaults, **options})


def known(root: Path) -> dict[bytes, Path]:
    """The path of each image by its pixels."""
    return {read_image(str(path)).numpy().tobytes(): path for path in root.rglob("*.png")}


def paths(images: Tensor, data: DomainPairDataModule, known: dict[bytes, Path]) -> list[Path]:
    """Where images that were not augmented are from."""
    pixels = data.denormalize(images).mul(255).round().to(torch.uint8)
    return [known[image.numpy().tobytes()] for image in pixels]


# ---------------------------------------------------------------------- the sampler
def reference(sizes: list[int], length: int, seed: int) -> list[int]:
    """The endless stream from the front: the domains take turns, each with one permutation after the other.

    The images of a domain come one after the other, so that domain ``d`` begins at ``sum(sizes[:d])``.
    """
    streams = []
    for domain, size in enumerate(sizes):
        drawn: list[int] = []
        while len(drawn) < length:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(drawn) // size * len(sizes) + domain)
            drawn += [sum(sizes[:domain]) + i for i in torch.randperm(size, generator=generator).tolist()]
        streams.append(drawn)
    return [streams[n % len(sizes)][n // len(sizes)] for n in range(length)]


def sampler(sizes: list[int], batch_size: int = 6, rank: int = 0, world: int = 1, at: int = 0) -> StreamSampler:
    domains = [domain for domain, size in enumerate(sizes) for _ in range(size)]
    return StreamSampler(domains, batch_size, 5, 3, rank, world, lambda: at)


@pytest.mark.parametrize("sizes", [[6, 6], [13, 4, 7], [20, 3]])
def test_domains_take_turns_each_with_its_own_permutations(sizes: list[int]) -> None:
    served = [draw for epoch in range(4) for draw in sampler(sizes, at=5 * epoch)]
    assert [int(draw) for draw in served] == reference(sizes, 120, seed=3)
    assert [draw.number for draw in served] == list(range(120))  # which seed the augmentations: none is there twice
    for domain, size in enumerate(sizes):
        own = [int(draw) for draw in served[domain :: len(sizes)]]
        first = sum(sizes[:domain])
        for start in range(0, len(own) - size + 1, size):  # every pass is complete
            assert sorted(own[start : start + size]) == list(range(first, first + size))


def test_domains_of_one_size_have_orders_of_their_own() -> None:
    served = [int(draw) for epoch in range(4) for draw in sampler([20, 20], at=5 * epoch)]
    first, second = served[0:120:2], [i - 20 for i in served[1:120:2]]
    passes = [tuple(own[start : start + 20]) for own in (first, second) for start in (0, 20, 40)]
    assert len(set(passes)) == 6


def test_one_source_is_drawn_as_ever() -> None:
    """Against indices that the sampler gave when there was one source only, and against its formula of then."""
    stored = [6, 2, 0, 3, 4, 1, 5, 6, 3, 1, 4, 2, 0, 5, 3, 0, 4, 6, 5, 2, 1, 1, 2, 5, 4, 6, 3, 0, 2, 0]
    assert [int(draw) for draw in sampler([7])] == stored
    formula = []
    for k in range(5):
        formula += torch.randperm(7, generator=torch.Generator().manual_seed(3 * 1_000_003 + k)).tolist()
    assert stored == formula[:30]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batch_of_one_process(world: int) -> None:
    sizes = [13, 4, 7]
    ranks = [list(sampler(sizes, 3, rank, world, at=2)) for rank in range(world)]
    one = list(sampler(sizes, 3 * world, at=2))
    for batch in range(5):
        together = [draw for rank in ranks for draw in rank[3 * batch : 3 * batch + 3]]
        expected = one[3 * world * batch : 3 * world * (batch + 1)]
        assert [(int(d), d.number) for d in together] == [(int(d), d.number) for d in expected]


@pytest.mark.parametrize("start", range(5))
def test_entering_anywhere_equals_the_uninterrupted_stream(start: int) -> None:
    served = [(int(d), d.number) for d in sampler([13, 4, 7], at=start)]
    assert [index for index, _ in served] == reference([13, 4, 7], 60, seed=3)[6 * start :][:30]
    assert served[0][1] == 6 * start


# ---------------------------------------------------------------------- batches
@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_holds_equally_many_of_each(root: Path, recorder: Any, trainer: Any, workers: int) -> None:
    data = build(root, crop="none", horizontal_flip=False, num_workers=workers)
    trainer(max_epochs=3).fit(recorder, data)
    assert len(data.source_files) == 36 + 18 + 27
    assert len(recorder.seen["train"]) == 3 * (81 // 6)  # an epoch: as many images as all folders together
    files, seen = known(root), []
    for batch in recorder.seen["train"]:
        assert type(batch) is DomainBatch
        assert type(batch.source) is LabelledBatch
        assert (batch.source.domains.dtype, batch.source.domains.tolist()) == (torch.long, [0, 1, 2, 0, 1, 2])
        found = paths(batch.source.images, data, files)
        assert [path.parent.parent.name for path in found] == ["abc"[d] for d in batch.source.domains]
        assert [CLASSES.index(path.parent.name) for path in found] == batch.source.labels.tolist()
        seen += found
    for domain, size in enumerate((36, 18, 27)):  # each folder passes through its images, whatever its size
        own = seen[domain::3]
        passes = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(passes) == 78 // size
        assert all(len(set(images)) == size for images in passes)


def test_domains_stay_with_their_images_in_validation(root: Path, recorder: Any, trainer: Any) -> None:
    data = build(root, val_fraction=0.3)
    trainer(max_epochs=1).fit(recorder, data)
    files, counts = known(root), torch.zeros(3, 3, dtype=torch.long)
    for number, batch in recorder.seen["val"]:
        if number == 0:
            found = paths(batch.images, data, files)
            assert [path.parent.parent.name for path in found] == ["abc"[d] for d in batch.domains]
            for domain, label in zip(batch.domains.tolist(), batch.labels.tolist(), strict=True):
                counts[domain, label] += 1
    assert counts.tolist() == [[4, 4, 4], [2, 2, 2], [3, 3, 3]]  # 30 % of each class of each folder
    assert not set(data.source_files.paths) & set(data.source_val_files.paths)


def test_a_folder_is_split_as_if_it_were_alone(root: Path) -> None:
    held_out = []
    for sources in ("a", "abc", "cba"):
        data = build(root, sources, val_fraction=0.3)
        data.setup("fit")
        held_out.append({path for path in data.source_val_files.paths if path.startswith(str(root / "a"))})
    assert held_out[0] == held_out[1] == held_out[2]
    assert len(held_out[0]) == 12


@pytest.mark.parametrize(("given", "expected"), [("c", {0: 30}), ("bc", {0: 21, 1: 30})])
def test_folders_for_validation(root: Path, recorder: Any, trainer: Any, given: str, expected: dict[int, int]) -> None:
    folders = [str(root / name) for name in given]
    data = build(root, "ab", source_val=folders if len(folders) > 1 else folders[0])
    trainer(max_epochs=1).fit(recorder, data)
    domains = torch.cat([batch.domains for number, batch in recorder.seen["val"] if number == 0])
    assert {domain: int((domains == domain).sum()) for domain in domains.unique().tolist()} == expected
    assert len(data.source_files) == 39 + 21


def test_one_folder_in_a_list_is_one_folder(root: Path) -> None:
    seen = []
    for source in (str(root / "a"), [str(root / "a")]):
        data = DomainPairDataModule(source, str(root / "target"), batch_size=4, image_size=16, num_workers=0)
        data.setup("fit")
        batches = [batch.source for batch, *_ in data.train_dataloader()]
        assert all(batch.domains.tolist() == [0] * 4 for batch in batches)
        seen.append((torch.cat([batch.images for batch in batches]), data._split_table(), data.state_dict()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1:] == seen[1][1:]
    assert "sources" not in seen[0][2]


def test_test_images_are_of_domain_zero(root: Path, recorder: Any, trainer: Any) -> None:
    trainer().test(recorder, build(root, target_test=str(root / "c")), verbose=False)
    assert {int(d) for batch in recorder.seen["test"] for d in batch.domains} == {0}


def test_augmentation_differs_between_the_domains(
    tmp_path: Path, images: Writer, make_recorder: Any, trainer: Any
) -> None:
    """Two folders of one image, the same one: what the draws make of it is never the same."""
    for name in "ab":
        images(tmp_path / name, ["x", "y"], count=1, size=64, seed=0)
    images(tmp_path / "target", None, count=4)
    recorder = make_recorder()
    data = build(tmp_path, "ab", batch_size=4, val_fraction=0.0, crop="random_resized", steps_per_epoch=3)
    trainer(max_epochs=1).fit(recorder, data)
    crops = torch.cat([batch.source.images for batch in recorder.seen["train"]])
    assert len({crop.numpy().tobytes() for crop in crops}) == 12


def test_overfitting_takes_images_of_each(root: Path, recorder: Any, trainer: Any) -> None:
    trainer(overfit_batches=2, max_epochs=2).fit(recorder, build(root))
    assert [batch.source.domains.tolist() for batch in recorder.seen["train"]] == [[0, 1, 2, 0, 1, 2]] * 4


def equal(ours: DomainBatch, theirs: DomainBatch) -> bool:
    pairs = [*zip(ours.source, theirs.source, strict=True), (ours.target, theirs.target)]
    return all(torch.equal(a, b) for a, b in pairs)


def test_workers_change_nothing(root: Path, make_recorder: Any, trainer: Any) -> None:
    seen = []
    for workers in (0, 2):
        recorder = make_recorder()
        torch.manual_seed(workers)
        trainer(max_epochs=2, limit_train_batches=4).fit(recorder, build(root, num_workers=workers))
        seen.append(recorder.seen["train"])
    assert len(seen[0]) == 8
    assert all(equal(ours, theirs) for ours, theirs in zip(*seen, strict=True))


@pytest.mark.parametrize("stop", [5, 13, 17])
def test_a_resumed_run_sees_the_rest(root: Path, make_recorder: Any, trainer: Any, tmp_path: Path, stop: int) -> None:
    whole, rest = make_recorder(), make_recorder()

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if len(whole.seen["train"]) == stop:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    trainer(max_epochs=2, callbacks=[Save()]).fit(whole, build(root))
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["DomainPairDataModule"]
    assert state["sources"] == [str(root / name) for name in "abc"]
    trainer(max_epochs=2).fit(rest, build(root, num_workers=1), ckpt_path=tmp_path / "run.ckpt")
    assert len(rest.seen["train"]) == 26 - stop
    assert all(equal(a, b) for a, b in zip(whole.seen["train"][stop:], rest.seen["train"], strict=True))


def test_two_ranks_take_the_batch_of_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 processes with 6 images are 1 with 12: the same images with the same augmentations, in the same order."""

    def batches(batch_size: int, rank: int, world: int) -> list[DomainBatch]:
        monkeypatch.setattr(DomainPairDataModule, "_rank", rank)
        monkeypatch.setattr(DomainPairDataModule, "_world_size", world)
        data = build(root, batch_size=batch_size, steps_per_epoch=4)
        data.setup("fit")
        return [batch for batch, *_ in data.train_dataloader()]

    one, first, second = batches(12, 0, 1), batches(6, 0, 2), batches(6, 1, 2)
    assert len(one) == len(first) == len(second) == 4
    for whole, *parts in zip(one, first, second, strict=True):
        for expected, *given in zip(whole.source, *(part.source for part in parts), strict=True):
            assert torch.equal(expected, torch.cat(given))


def test_hyperparameters_are_in_the_checkpoint(root: Path, recorder: Any, trainer: Any, tmp_path: Path) -> None:
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(recorder, build(root))
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = DomainPairDataModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert again.sources == again.source == [str(root / name) for name in "abc"]


# ---------------------------------------------------------------------- the split
def test_the_split_names_the_folder(root: Path, recorder: Any, trainer: Any, tmp_path: Path) -> None:
    data, logger = build(root), CSVLogger(tmp_path)
    trainer(max_epochs=1, limit_train_batches=1, logger=logger).fit(recorder, data)
    with (Path(logger.log_dir) / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["split", "folder", "file"]
    listed = [str(Path(row["folder"]) / row["file"]) for row in rows]
    assert len(set(listed)) == len(listed)
    assert {Path(path) for path in listed} == set(root.rglob("*.png"))
    for name in ("source", "source_val", "target", "target_val"):
        split = name if name.endswith("val") else f"{name}_train"
        files = {path for row, path in zip(rows, listed, strict=True) if row["split"] == split}
        assert files == set(getattr(data, f"{name}_files").paths)


def checkpoint(root: Path, recorder: Any, trainer: Any, path: Path, sources: str) -> Path:
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(recorder, build(root, sources))
    run.save_checkpoint(path)
    return path


def test_a_changed_folder_is_refused(
    root: Path, make_recorder: Any, trainer: Any, tmp_path: Path, images: Writer
) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    saved = checkpoint(copy, make_recorder(), trainer, tmp_path / "run.ckpt", "ab")
    trainer().validate(make_recorder(), build(copy, "ba"), ckpt_path=saved, verbose=False)  # the same images
    images(copy / "b", CLASSES, count=8)
    for function in (trainer().validate, trainer(max_epochs=2).fit):
        with pytest.raises(ConfigurationError, match=rf"'{copy}/a' and '{copy}/b' and '{copy}/target'"):
            function(make_recorder(), build(copy, "ab"), ckpt_path=saved)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("a", "ab", "as many folders as in the run of the checkpoint, 1, but got 2"),
        ("ab", "a", "as many folders as in the run of the checkpoint, 2, but got 1"),
        ("ab", "abc", "as many folders as in the run of the checkpoint, 2, but got 3"),
        (
            "ab",
            "ba",
            r"in the order of the checkpoint's run, '\[.*/a, .*/b\]', but got them in another",
        ),
    ],
)
def test_other_sources_cannot_resume(
    root: Path, make_recorder: Any, trainer: Any, tmp_path: Path, before: str, after: str, message: str
) -> None:
    saved = checkpoint(root, make_recorder(), trainer, tmp_path / "run.ckpt", before)
    recorder = make_recorder()
    with pytest.raises(ConfigurationError, match=f"Expected .*{message}"):
        trainer(max_epochs=2).fit(recorder, build(root, after), ckpt_path=saved)
    assert recorder.seen["train"] == []


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "`--data.source` to name a folder or several, but got an empty list"),
        (["{r}/a", "{r}/b", "{r}/a"], "`--data.source` to name each folder once, but got '.*/a' twice"),
        (["{r}/a", "{r}/b/../a"], "to name each folder once, but got '.*/b/../a', which is '.*/a' again"),
        (["{r}/a", "{r}/b", "{r}/c", "{r}/d"], "`--data.batch_size` to be a multiple of 4, .* got 6. Take 4 or 8"),
        ([f"{{r}}/{i}" for i in range(7)], "`--data.batch_size` to be a multiple of 7, .* got 6. Take 7"),
    ],
)
def test_lists_that_cannot_be(root: Path, given: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DomainPairDataModule([folder.format(r=root) for folder in given], "target", batch_size=6)


def test_validation_folders_that_cannot_be(root: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`--data.source_val` to name each folder once"):
        build(root, source_val=[str(root / "a"), str(root / "a")])
    with pytest.raises(ConfigurationError, match=r"`--data.source_val` to name a folder or several"):
        build(root, source_val=[])


def test_classes_must_be_the_same(root: Path, tmp_path: Path, images: Writer, recorder: Any, trainer: Any) -> None:
    other = images(tmp_path / "other", ["ant", "bee", "dog"])
    data = DomainPairDataModule([str(root / "a"), str(root / "b"), str(other)], str(root / "target"), batch_size=6)
    message = rf"every folder of `--data.source` .* under '{other}' are missing: 'cat'; and not under '{root}/a': 'dog'"
    with pytest.raises(ConfigurationError, match=message):
        _ = data.num_classes
    with pytest.raises(ConfigurationError, match=message):
        trainer().fit(recorder, data)
    with pytest.raises(ConfigurationError, match=rf"`--data.source_val` to hold the 3 classes .* under '{other}'"):
        trainer().fit(recorder, build(root, source_val=[str(root / "c"), str(other)]))


def test_each_folder_holds_its_share(
    root: Path, tmp_path: Path, images: Writer, recorder: Any, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = str(images(tmp_path / "few", CLASSES, count=2))
    options: dict[str, Any] = {"val_fraction": 0.0, "target_batch_size": 4, "num_workers": 0, "image_size": 16}

    def fit(batch_size: int) -> None:
        data = DomainPairDataModule([str(root / "a"), few], str(root / "target"), batch_size=batch_size, **options)
        trainer(max_epochs=1, limit_train_batches=1).fit(recorder, data)

    fit(12)
    with pytest.raises(
        ConfigurationError, match=rf"share of a batch, 7 of `--data.batch_size` = 14 images, but 6 .* under '{few}'"
    ):
        fit(14)
    monkeypatch.setattr(DomainPairDataModule, "_world_size", 2)
    with pytest.raises(ConfigurationError, match=r"share of a batch, 4 of .* = 8 images on each of 2 processes, but 6"):
        fit(8)


def test_a_corrupt_file_and_an_empty_class_name_their_folder(
    root: Path, tmp_path: Path, recorder: Any, trainer: Any
) -> None:
    copy = shutil.copytree(root / "b", tmp_path / "copy")
    data = DomainPairDataModule([str(root / "a"), str(copy)], str(root / "target"), num_workers=0, image_size=16)
    (copy / "bee" / "3.png").write_bytes(b"no image")
    with pytest.raises(ConfigurationError, match=rf"`--data.source` .* 1 of 21 cannot: '{copy}/bee/3.png'"):
        trainer().fit(recorder, data)
    shutil.rmtree(copy / "bee")
    (copy / "bee").mkdir()
    with pytest.raises(ConfigurationError, match=rf"`--data.source` to hold images, .* none in 'bee' under '{copy}'"):
        trainer().fit(recorder, data)
