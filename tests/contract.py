"""What the contract tests and their two-process job share: every method, on tiny folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

import framework.modules  # noqa: F401  (every method is a subclass once it is imported)
from framework.datamodules import DomainPairDataModule
from framework.modules import DomainAdaptation
from framework.trainer import Trainer


def methods(base: type[DomainAdaptation] = DomainAdaptation) -> list[type[DomainAdaptation]]:
    """Every method: the subclasses of the base, and theirs."""
    found = []
    for cls in base.__subclasses__():
        if cls.__module__.startswith("framework."):
            found.append(cls)
        found += methods(cls)
    return sorted(found, key=lambda cls: cls.__name__)


def build_data(root: Path, **options: Any) -> DomainPairDataModule:
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "steps_per_epoch": 5,
        "image_size": 16,
        "crop": "pad",
        "num_workers": 0,
    }
    folders = {"source": str(root / "source"), "target": str(root / "target"), "target_test": str(root / "target_test")}
    return DomainPairDataModule(**{**folders, **defaults, **options})


def build_model(method: type[DomainAdaptation], **options: Any) -> DomainAdaptation:
    defaults: dict[str, Any] = {
        "backbone": "resnet8",
        "bottleneck_features": 16,
        "bottleneck_dropout": 0.5,
        "learning_rate": 0.05,
        "backbone_learning_rate_factor": 1.0,
        "schedule": "inverse_decay",
    }
    return method(3, **{**defaults, **options})


class SaveAt(L.Callback):
    """Writes a checkpoint after a number of batches, wherever in the epoch that is."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path, self.seen = batches, path, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)


def fit(
    method: type[DomainAdaptation],
    root: Path,
    *,
    seed: int = 0,
    save: tuple[int, Path] | None = None,
    resume: Path | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **trainer: Any,
) -> DomainAdaptation:
    """Train a method on the tiny folders and return it; with ``save`` a checkpoint is written on the way."""
    L.seed_everything(seed, verbose=False)
    module = build_model(method, **(model or {}))
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "callbacks": [SaveAt(*save)] if save else [],
    }
    Trainer(**{**defaults, **trainer}).fit(module, build_data(root, **(data or {})), ckpt_path=resume)
    return module


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
