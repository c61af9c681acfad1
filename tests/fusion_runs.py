"""What the tests of knowledge fusion share: short runs on small folders, and their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

import framework
from framework import ImageFolderDataModule, Trainer

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1}


def build_data(root: Path | str, **options: Any) -> ImageFolderDataModule:
    small = {"batch_size": 4, "steps_per_epoch": 3, "image_size": 16, "crop": "pad", "num_workers": 0}
    return ImageFolderDataModule(str(root), **{"val_fraction": 0.25, **small, **options})


def train(
    root: Path, cls: str = "TransferClassifier", seed: int = 0, data: dict[str, Any] | None = None, **options: Any
) -> Path:
    """Checkpoint ``last.ckpt`` of a run in the working directory."""
    trainer_options = options.pop("trainer", {})
    L.seed_everything(seed, verbose=False)
    datamodule = build_data(root, **{"seed": 0, **(data or {})})
    defaults = {"backbone": "resnet8", "learning_rate": 0.05, "backbone_learning_rate_factor": 1.0}
    model = getattr(framework, cls)(datamodule.num_classes, **{**defaults, **options})
    trainer = Trainer(**{**QUIET, "experiment": "made", **trainer_options})
    trainer.fit(model, datamodule)
    return Path(str(trainer.log_dir)) / "checkpoints" / "last.ckpt"


def load(path: Path | str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def bits(value: torch.Tensor) -> bytes:
    return value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, the sign of zeros too."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and bits(first[name]) == bits(second[name]) for name in first
    )
