"""Cached images are those that are decoded, whoever writes them, and whatever happens meanwhile."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

import framework.datamodules.cache as module
from framework.batch import DomainBatch
from framework.datamodules import DomainPairDataModule, ImageFolderDataModule, UnlabelledFolderDataModule
from framework.datamodules.cache import CachedImages, ImageCache
from framework.datamodules.folders import joined, labelled_images, unlabelled_images
from framework.errors import ConfigurationError

ALL = {"color_jitter": 0.5, "grayscale": 0.2, "blur": 0.5}


@pytest.fixture(autouse=True)
def memory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own instead of the machine's shared memory."""
    folder = tmp_path_factory.mktemp("memory")
    monkeypatch.setattr(module, "_memory_folder", lambda: folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images of many shapes, formats and modes, in two folders with the same classes and one without."""
    root, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(4)
    for folder, classes, count in (("source", ["ant", "bee"], 11), ("other", ["ant", "bee"], 5), ("target", [""], 13)):
        for name in classes:
            (root / folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                height, width = generator.integers(5, 60, 2)
                image = Image.fromarray(generator.integers(0, 256, (height, width, 3)).astype(np.uint8))
                suffix = (".jpg", ".png", ".bmp")[i % 3]
                image.convert("L" if i % 4 == 3 else "RGB").save(root / folder / name / f"{i}{suffix}")
    return {name: root / name for name in ("source", "other", "target")}


def build(kind: str, photographs: dict[str, Path], **options: Any) -> Any:
    source, other, target = (str(photographs[name]) for name in ("source", "other", "target"))
    defaults: dict[str, Any] = {"batch_size": 4, "steps_per_epoch": 5, "image_size": 20, "num_workers": 0, "seed": 3}
    defaults |= options
    if kind == "folder":
        return ImageFolderDataModule(source, **defaults)
    if kind == "pair":
        return DomainPairDataModule([source, other], target, target_test=other, **defaults)
    return UnlabelledFolderDataModule([source, target], **defaults)


def tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, DomainBatch):
        return [*batch.source, batch.target]
    return [batch] if isinstance(batch, torch.Tensor) else [part for part in batch if isinstance(part, torch.Tensor)]


def batches(loaders: Any) -> list[torch.Tensor]:
    return [
        part
        for loader in (loaders if isinstance(loaders, list) else [loaders])
        for b in loader
        for part in tensors(unpacked(b))
    ]


def unpacked(batch: Any) -> Any:
    """``CombinedLoader`` gives the batch with two numbers."""
    return batch[0] if type(batch) is tuple and len(batch) == 3 else batch


def served(data: Any) -> list[torch.Tensor]:
    """All that a datamodule serves of an epoch of each stage."""
    data.setup("fit")
    found = [*batches(data.train_dataloader()), *batches(data.val_dataloader())]
    if not isinstance(data, UnlabelledFolderDataModule):
        data.setup("test"), data.setup("predict")
        found += [*batches(data.test_dataloader()), *batches(data.predict_dataloader())]
    return found


@pytest.mark.parametrize("kind", ["folder", "pair", "unlabelled"])
@pytest.mark.parametrize(
    ("options", "storage"),
    [
        ({"crop": "random_resized"}, "memory"),
        ({"crop": "center", "resize_size": 33, **ALL}, "disk"),
        ({"crop": "pad"}, "disk"),
        ({"crop": "none", "horizontal_flip": False}, "memory"),
        ({"crop": "random_resized", "views": 2, **ALL}, "disk"),
        ({"crop": "pad", "num_workers": 2}, "memory"),
    ],
)
def test_batches_are_the_same_to_the_last_bit(
    photographs: dict[str, Path], tmp_path: Path, kind: str, options: dict[str, Any], storage: str
) -> None:
    if options.get("views") and kind == "folder":
        pytest.skip("the views are of all three alike")
    expected = served(build(kind, photographs, **options))
    data = build(kind, photographs, **options, cache=storage, cache_dir=str(tmp_path / "cache"))
    found = served(data)
    assert len(found) == len(expected) > 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(data._caches) == {"folder": 1, "pair": 3, "unlabelled": 2}[kind]  # one a folder, whatever its parts


def test_batches_do_come_from_the_cache(photographs: dict[str, Path], tmp_path: Path) -> None:
    data = build("folder", photographs, cache="disk", cache_dir=str(tmp_path), crop="none", horizontal_flip=False)
    data.setup("fit")
    data.train_dataloader()
    (file,) = tmp_path.glob("*.pixels")
    file.write_bytes(bytes(file.stat().st_size))
    assert all(part.max() == 0 for part in batches(data.train_dataloader()) if part.ndim == 4)


def paths_below(folder: Path) -> list[str]:
    return unlabelled_images(folder, "x").paths


def test_what_an_index_holds(photographs: dict[str, Path], tmp_path: Path) -> None:
    paths = paths_below(photographs["source"])
    cache = ImageCache(paths[::-1], 24, "disk", str(tmp_path))
    assert len(cache) == 22
    assert cache.paths == sorted(paths)
    for index, path in enumerate(sorted(paths)):
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        expected = functional.resize(pixels, [24, 24], antialias=True)
        assert (cache[index].int() - expected.int()).abs().max() <= 2
    cache[0].zero_()  # a copy
    assert cache[0].any()
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again[3], cache[3])


def test_a_batch_of_several_folders(photographs: dict[str, Path], tmp_path: Path) -> None:
    files = joined([labelled_images(photographs[name], "x") for name in ("source", "other")])
    caches = [ImageCache(paths, 8, "disk", str(tmp_path)) for paths in files.folders]
    cached = CachedImages(files, caches)
    for index in (5, 0, 31):
        image = cached.view(index)
        cache = caches[files.domains[index]]
        assert torch.equal(image, cache[cache.paths.index(files.paths[index])])


# ---------------------------------------------------------------------- one file, for how long
def fresh_folder(tmp_path: Path, images: Callable[..., Path]) -> list[str]:
    return paths_below(images(tmp_path / "images", ["a", "b"]))


def test_written_once_and_again_where_a_file_changes(tmp_path: Path, images: Callable[..., Path]) -> None:
    paths, folder = fresh_folder(tmp_path, images), tmp_path / "cache"
    assert not ImageCache.exists(paths, 8, "disk", str(folder))
    first = ImageCache(paths, 8, "disk", str(folder))
    written = first.file.stat().st_mtime_ns
    assert ImageCache.exists(paths, 8, "disk", str(folder))
    assert ImageCache(paths, 8, "disk", str(folder)).file.stat().st_mtime_ns == written
    names = {first.file.name}
    names.add(ImageCache(paths, 9, "disk", str(folder)).file.name)  # another size
    names.add(ImageCache(paths[1:], 8, "disk", str(folder)).file.name)  # other files
    os.utime(paths[0], ns=(0, 0))
    names.add(ImageCache(paths, 8, "disk", str(folder)).file.name)  # another time
    Image.new("RGB", (16, 16)).save(paths[0])
    os.utime(paths[0], ns=(0, 0))
    changed = ImageCache(paths, 8, "disk", str(folder))  # another length
    assert changed[0].max() == 0
    assert len(names | {changed.file.name}) == 5


def test_a_file_of_another_length_is_not_taken(tmp_path: Path, images: Callable[..., Path]) -> None:
    paths, folder = fresh_folder(tmp_path, images), str(tmp_path / "cache")
    cache = ImageCache(paths, 8, "disk", folder)
    expected = [cache[i] for i in range(12)]
    cache.file.write_bytes(b"half")
    again = ImageCache(paths, 8, "disk", folder)
    assert all(torch.equal(again[i], expected[i]) for i in range(12))


def test_memory_is_freed_by_the_last_user(tmp_path: Path, images: Callable[..., Path], memory: Path) -> None:
    paths = fresh_folder(tmp_path, images)
    first, second = ImageCache(paths, 8, "memory"), ImageCache(paths, 8, "memory")
    assert first.file == second.file
    pixels = first.pixels
    del first
    gc.collect()
    assert second.file.exists()
    del second
    gc.collect()
    assert list(memory.iterdir()) == []
    assert pixels.any()  # still mapped


def test_a_datamodule_lets_go_of_the_memory(photographs: dict[str, Path], memory: Path) -> None:
    data = build("pair", photographs, cache="memory")
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(list(memory.glob("*.pixels"))) == 3
    del data, loader
    gc.collect()
    assert list(memory.iterdir()) == []


def test_disk_is_kept(tmp_path: Path, images: Callable[..., Path]) -> None:
    cache = ImageCache(fresh_folder(tmp_path, images), 8, "disk", str(tmp_path / "cache"))
    file = cache.file
    del cache
    gc.collect()
    assert file.exists()


JOB = """
import os, sys, time
from pathlib import Path
import framework.datamodules.cache as module
from framework.datamodules.folders import unlabelled_images
storage, images, folder, slow = sys.argv[1:]
module._memory_folder = lambda: Path(folder)
read, decoded = module.read_pixels, []
def slowly(path):
    time.sleep(float(slow))
    decoded.append(path)
    return read(path)
module.read_pixels = slowly
cache = module.ImageCache(unlabelled_images(images, "x").paths, 8, storage, folder)
print(len(decoded), int(cache.pixels.sum(dtype=int)), flush=True)
sys.stdin.read()
"""


def job(storage: str, images: Path, folder: Path, slow: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOB, storage, str(images), str(folder), str(slow)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_two_writers_and_a_kill(tmp_path: Path, images: Callable[..., Path], storage: str) -> None:
    """A process that is killed while it decodes leaves nothing that counts; of the next two one decodes."""
    folder, root = tmp_path / "cache", images(tmp_path / "images", ["a", "b"])
    killed = job(storage, root, folder, slow=60)
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(folder.glob("*.partial"))) == 1
    assert not list(folder.glob("*.pixels"))
    jobs = [job(storage, root, folder, slow=0.1) for _ in range(2)]
    lines = [process.stdout.readline().split() for process in jobs]  # type: ignore[union-attr]
    assert sorted(line[0] for line in lines) == ["0", "12"]
    assert lines[0][1] == lines[1][1] != "0"
    assert not list(folder.glob("*.partial"))
    jobs[0].communicate("")
    assert len(list(folder.glob("*.pixels"))) == 1  # the other one has it still
    jobs[1].communicate("")
    assert [process.returncode for process in jobs] == [0, 0]
    assert len(list(folder.iterdir())) == (0 if storage == "memory" else 2)


@pytest.mark.slow
def test_what_a_killed_process_leaves_in_memory(tmp_path: Path, images: Callable[..., Path]) -> None:
    folder = tmp_path / "cache"
    first = job("memory", images(tmp_path / "one"), folder)
    assert first.stdout is not None
    assert first.stdout.readline()
    living = job("memory", images(tmp_path / "two"), folder)
    assert living.stdout is not None
    assert living.stdout.readline()
    first.kill()
    first.communicate()
    assert len(list(folder.glob("*.pixels"))) == 2
    third = job("memory", images(tmp_path / "three"), folder)
    assert third.stdout is not None
    assert third.stdout.readline()
    assert len(list(folder.glob("*.pixels"))) == 2  # that of the living process, and its own
    for process in (living, third):
        process.communicate("")
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------- what is refused
def test_too_little_room(
    tmp_path: Path, images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    paths = fresh_folder(tmp_path, images)  # 12 images of 192 bytes
    monkeypatch.setattr(module, "_free_memory", lambda: [2400])
    with pytest.raises(ConfigurationError, match=r"`--data.cache memory` to have room for 12 images of 8 px, 0.00 MiB"):
        ImageCache(paths, 8, "memory")
    monkeypatch.setattr(module, "_free_memory", lambda: [3000])
    ImageCache(paths, 8, "memory")
    gc.collect()
    assert list(memory.iterdir()) == []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2303))
    with pytest.raises(ConfigurationError, match=r"`--data.cache disk` .* with more room, .* or `--data.cache none`"):
        ImageCache(paths, 8, "disk", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.p*"))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2304))
    ImageCache(paths, 8, "disk", str(tmp_path / "cache"))


def test_the_disk_is_full(tmp_path: Path, images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = fresh_folder(tmp_path, images)
    monkeypatch.setattr(module.os, "pwrite", lambda *_: 7)
    with pytest.raises(ConfigurationError, match=r"`--data.cache disk` .* cannot: No space left on device"):
        ImageCache(paths, 8, "disk", str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_broken_image_ends_the_writing(tmp_path: Path, images: Callable[..., Path]) -> None:
    paths = fresh_folder(tmp_path, images)
    Path(paths[4]).write_bytes(b"no image")
    with pytest.raises(ConfigurationError, match=f"Expected '{paths[4]}' to be an image that can be read"):
        ImageCache(paths, 8, "disk", str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
    Path(paths[4]).unlink()
    with pytest.raises(ConfigurationError, match=f"Expected '{paths[4]}' to be an image that can be read"):
        ImageCache(paths, 8, "disk", str(tmp_path / "cache"))


def test_no_folder_for_it(tmp_path: Path, images: Callable[..., Path]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"`--data.cache disk` to find a folder .* `--data.cache_dir`"):
        ImageCache(fresh_folder(tmp_path, images), 8, "disk", str(tmp_path / "file" / "cache"))


def test_an_unknown_place() -> None:
    with pytest.raises(ConfigurationError, match=r"`--data.cache` to be 'none', 'memory' or 'disk', but got 'ram'"):
        ImageFolderDataModule("x", cache="ram")  # type: ignore[arg-type]


def test_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module._disk_folder(None) == tmp_path / "transfer-framework"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module._disk_folder(None) == tmp_path / ".cache" / "transfer-framework"
    assert module._disk_folder("~/mine") == tmp_path / "mine"


# ---------------------------------------------------------------------- in a run
def test_a_run(photographs: dict[str, Path], make_recorder: Any, trainer: Any, tmp_path: Path) -> None:
    """Without and with a cache, and resumed with one in mid-epoch."""
    runs = []
    for cache in ("none", "memory", "disk"):
        recorder = make_recorder()
        trainer(max_epochs=2).fit(recorder, build("pair", photographs, cache=cache, cache_dir=str(tmp_path)))
        runs.append([part for batch in recorder.seen["train"] for part in tensors(batch)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_images_in_a_cache_are_not_checked_again(
    photographs: dict[str, Path], recorder: Any, trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    monkeypatch.setattr("framework.datamodules.base.check_images", lambda paths, flag: checked.append(len(paths)))
    for expected in ([22], [22]):
        data = build("folder", photographs, cache="disk", cache_dir=str(tmp_path))
        trainer(max_epochs=1).fit(recorder, data)
        assert checked == expected
