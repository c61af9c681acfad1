"""What the contract tests of pre-training and their two-process job share: every method, on two tiny folders."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from transfer_contract import QUIET, SaveAt

import framework.modules  # noqa: F401  (every method is a subclass once it is imported)
from framework.datamodules import UnlabelledFolderDataModule
from framework.modules import PretrainingModule
from framework.trainer import Trainer

CLASSES = ["ant", "bee", "cat"]
# for images of 16 pixels, given to a method whose constructor asks for it by that name
SMALL: dict[str, Any] = {"block_size": 4, "grid": 2, "permutations": 4, "projection_features": 16}


def methods(base: type[PretrainingModule] = PretrainingModule) -> list[type[PretrainingModule]]:
    """Every method: the subclasses of the base, and theirs."""
    found = []
    for cls in base.__subclasses__():
        if cls.__module__.startswith("framework."):
            found.append(cls)
        found += methods(cls)
    return sorted(found, key=lambda cls: cls.__name__)


def prepare(root: Path, images: Callable[..., Path]) -> Path:
    """Write two folders of images: one with class folders, one without."""
    images(root / "all", None, count=18, seed=1)
    deal(root, "labelled", [7, 7, 4])
    images(root / "others", None, count=15, offset=60, seed=2)
    return root


def deal(root: Path, folder: str, sizes: list[int], names: list[str] = CLASSES) -> Path:
    """The images of ``all`` dealt to class folders of these sizes, in this order; without sizes to none.

    Files keep their names, so that sorted paths give the same images in the same order, however they are dealt.
    """
    files = sorted((root / "all").iterdir(), key=lambda path: int(path.stem))
    homes = [name for name, size in zip(names, sizes, strict=False) for _ in range(size)] or [""] * len(files)
    for number, (file, home) in enumerate(zip(files, homes, strict=True)):
        to = root / folder / home / f"{number:02}{file.suffix}"
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    return root / folder


def build_data(root: Path, method: type[PretrainingModule], **options: Any) -> UnlabelledFolderDataModule:
    defaults: dict[str, Any] = {
        "folders": [str(root / "labelled"), str(root / "others")],
        "views": method.views[0],
        "batch_size": 4,
        "steps_per_epoch": 5,
        "val_fraction": 0.2,
        "image_size": 16,
        "crop": "pad",
        "num_workers": 0,
    }
    return UnlabelledFolderDataModule(**{**defaults, **options})


def build_model(method: type[PretrainingModule], **options: Any) -> PretrainingModule:
    defaults: dict[str, Any] = {"backbone": "resnet8", "learning_rate": 0.01, "schedule": "inverse_decay"}
    known = inspect.signature(method.__init__).parameters
    defaults |= {name: value for name, value in SMALL.items() if name in known}
    return method(**{**defaults, **options})


def fit(
    method: type[PretrainingModule],
    root: Path,
    *,
    save: dict[int, Path] | None = None,
    resume: Path | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **trainer: Any,
) -> PretrainingModule:
    """Train a method on the tiny folders and return it; ``save`` says after which batches to write checkpoints."""
    L.seed_everything(0, verbose=False)
    module = build_model(method, **(model or {}))
    defaults = {**QUIET, "max_epochs": 3, "callbacks": [SaveAt(save)] if save else []}
    Trainer(**{**defaults, **trainer}).fit(module, build_data(root, method, **(data or {})), ckpt_path=resume)
    return module
