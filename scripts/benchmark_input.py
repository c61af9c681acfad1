"""Images a second of the input pipeline, relative to torchvision's ImageFolder with Pillow and v1 transforms.

All pipelines end in normalised float batches: a random resized crop to 224 px, half of them mirrored. (The reference's
are on the CPU, ours on ``--device``; ours keep the channels innermost in memory.) The first row,
without worker processes, is 1.0. The last row is what no pipeline can beat: copying cached pixels and normalising them.
In every repeat each pipeline runs once, one after the other, so that all see the same machine; figures are medians of
the repeats, with the least and the largest. Images are pieces of scikit-learn's two photographs.

    python scripts/benchmark_input.py [--repeats 7] [--images 512] [--json results.json] [--markdown results.md]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder

from framework import ImageFolderDataModule
from framework.allocator import keep_freed_memory
from framework.datamodules.cache import CachedImages

FLOOR, BOUND = "ImageFolder, Pillow, v1 transforms", "gather + normalise from cache"
PLAIN_BOUND = f"{BOUND}, as it is usually written"
KINDS = {"500x375 JPEG": ((500, 375), ".jpg"), "300x300 PNG": ((300, 300), ".png")}
Epoch = Callable[[], int]


def write_photographs(folder: Path, size: tuple[int, int], suffix: str, count: int) -> Path:
    """Pieces of photographs in two class folders, ``size`` is width and height in pixels."""
    generator = np.random.default_rng(0)
    for i in range(count):
        name = ("china", "flower")[i % 2]
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))  # 640 x 427
        width, height = int(generator.integers(320, 641)), int(generator.integers(213, 428))
        left, top = int(generator.integers(641 - width)), int(generator.integers(428 - height))
        piece = photograph.resize(size, box=(left, top, left + width, top + height))
        (folder / name).mkdir(parents=True, exist_ok=True)
        piece.save(folder / name / f"{i:05}{suffix}", **({"quality": 90} if suffix == ".jpg" else {}))
    return folder


def image_folder(root: Path, options: argparse.Namespace) -> Epoch:
    """The reference: torchvision's own dataset and transforms, as in its examples."""
    steps = [
        v1.RandomResizedCrop(options.image_size),
        v1.RandomHorizontalFlip(),
        v1.ToTensor(),
        v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    dataset = ImageFolder(str(root), v1.Compose(steps))

    def epoch() -> int:
        count = 0
        while count < options.images:
            loader = DataLoader(dataset, batch_size=options.batch_size, shuffle=True, drop_last=True)
            for images, _ in loader:
                count += len(images)
                if count >= options.images:
                    break
        return count

    return epoch


def data_module(root: Path, options: argparse.Namespace, **choices: Any) -> ImageFolderDataModule:
    """Ours, with all files in training."""
    data = ImageFolderDataModule(
        str(root),
        batch_size=options.batch_size,
        steps_per_epoch=max(1, options.images // options.batch_size),
        image_size=options.image_size,
        val_fraction=0.0,
        test_fraction=0.0,
        seed=0,
        **choices,
    )
    data.setup("fit")
    return data


def ours(root: Path, options: argparse.Namespace, **choices: Any) -> Epoch:
    """A training epoch of this project's datamodule."""
    data = data_module(root, options, **choices)
    loader = data.train_dataloader()

    def epoch() -> int:
        count = sum(len(data.on_after_batch_transfer(moved(batch, options), 0).images) for batch in loader)
        wait(options)
        return count

    return epoch


def moved(batch: Any, options: argparse.Namespace) -> Any:
    """The batch on the device, as a Trainer moves it."""
    return move_data_to_device(batch, torch.device(options.device))


def wait(options: argparse.Namespace) -> None:
    """For what the device still has to do."""
    if options.device != "cpu":
        torch.accelerator.synchronize()


def bound(root: Path, options: argparse.Namespace) -> Epoch:
    """Cached pixels, copied as a batch, cut without choice and normalised."""
    data = data_module(root, options, num_workers=0, cache="memory")
    cached = data._cached(data.train_files)
    assert isinstance(cached, CachedImages)
    generator, side = torch.Generator().manual_seed(0), options.image_size

    def epoch() -> int:
        count = 0
        for _ in range(max(1, options.images // options.batch_size)):
            indices = torch.randint(len(data.train_files), (options.batch_size,), generator=generator).tolist()
            images = torch.empty(options.batch_size, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            for row, index in zip(images, indices, strict=True):
                row.copy_(cached.view(index)[:, :side, :side])
            count += len(data.normalize(moved(images, options)))
        wait(options)
        return count

    return epoch


def plain_bound(root: Path, options: argparse.Namespace) -> Epoch:
    """The same with the channels outermost, ``(pixels[indices].float() / 255 - mean) / std``."""
    data = data_module(root, options, num_workers=0, cache="memory")
    cached = data._cached(data.train_files)
    assert isinstance(cached, CachedImages)
    side, files = options.image_size, range(len(data.train_files))
    pixels = torch.stack([cached.view(index)[:, :side, :side].contiguous() for index in files])
    mean, std = (torch.tensor(values, device=options.device).view(3, 1, 1) for values in (data.mean, data.std))

    def epoch() -> int:
        count = 0
        for _ in range(max(1, options.images // options.batch_size)):
            images = moved(pixels[torch.randint(len(pixels), (options.batch_size,))], options)
            count += len((images.float().div(255) - mean) / std)
        wait(options)
        return count

    return epoch


def measure(pipelines: dict[str, Epoch], repeats: int) -> dict[str, list[float]]:
    """Images a second of each pipeline in each repeat; one run before the first does not count."""
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for repeat in range(repeats + 1):
        for name, epoch in pipelines.items():
            start = time.perf_counter()
            count = epoch()
            if repeat:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def summary(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each pipeline the median, and its ratio to the reference of the same repeat: median, least and largest."""
    found = {}
    for name, values in rates.items():
        ratios = [value / floor for value, floor in zip(values, rates[FLOOR], strict=True)]
        found[name] = {
            "images_per_second": statistics.median(values),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "largest": max(ratios),
        }
    return found


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    kinds = list(results["kinds"])
    lines = [f"{key}: {value}" for key, value in results["machine"].items()]
    table = ["| input pipeline | " + " | ".join(f"{kind}, images/s | ratio (from - to)" for kind in kinds) + " |"]
    table.append("| --- |" + " --- | --- |" * len(kinds))
    for name in results["kinds"][kinds[0]]:
        cells = []
        for kind in kinds:
            row = results["kinds"][kind][name]
            cells.append(
                f"{row['images_per_second']:.0f} | {row['ratio']:.2f} ({row['least']:.2f} - {row['largest']:.2f})"
            )
        table.append(f"| {name} | " + " | ".join(cells) + " |")
    return "; ".join(lines) + "\n\n" + "\n".join(table) + "\n"


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "imagecodecs": version("imagecodecs") if find_spec("imagecodecs") else "none",
        "images": options.images,
        "batch size": options.batch_size,
        "repeats": options.repeats,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=512, help="in a repeat of a pipeline; with a cache 4 times that")
    parser.add_argument("--files", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="threads or processes, beside none")
    parser.add_argument("--augment_on_device", action="store_true", help="measure it too; a CPU is slow at it")
    parser.add_argument("--device", default="cpu", help="where batches are normalised, cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of this process; a loader's worker has one")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    options = parser.parse_args(arguments)
    if options.files < options.batch_size or options.images < options.batch_size:
        parser.error("Expected `--files` and `--images` to be at least `--batch_size`.")
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_freed_memory()  # as in a run there, for all pipelines
    results: dict[str, Any] = {"machine": machine(options), "kinds": {}}
    # many times as fast: with as few images, the threads' start would be a fifth of the time
    of_cached = argparse.Namespace(**{**vars(options), "images": 4 * options.images})
    for kind, (size, suffix) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            root = write_photographs(Path(folder), size, suffix, options.files)
            pipelines = {FLOOR: image_folder(root, options)}
            for cache, name, run in (
                ("none", "decoded each time", options),
                ("memory", "`--data.cache memory`", of_cached),
            ):
                pipelines[f"{name}, no workers"] = ours(root, run, cache=cache, num_workers=0)
                for kind_of_workers in ("processes", "threads"):
                    for count in options.workers:
                        choices = {"cache": cache, "num_workers": count, "workers": kind_of_workers}
                        pipelines[f"{name}, {count} {kind_of_workers}"] = ours(root, run, **choices)
            if options.augment_on_device:
                name = "`--data.cache memory --data.augment_on device`"
                pipelines[f"{name}, no workers"] = ours(
                    root, of_cached, cache="memory", num_workers=0, augment_on="device"
                )
                for count in options.workers:
                    choices = {"cache": "memory", "num_workers": count, "augment_on": "device"}
                    pipelines[f"{name}, {count} threads"] = ours(root, of_cached, **choices)
            pipelines[BOUND] = bound(root, of_cached)
            pipelines[PLAIN_BOUND] = plain_bound(root, of_cached)
            rates = measure(pipelines, options.repeats)
            results["kinds"][kind] = summary(rates)
            del pipelines  # and their workers
    table = markdown(results)
    print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(table, encoding="utf-8")
    return 0


if __name__ == "__main__":
    logging.getLogger("framework").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    sys.exit(main())
