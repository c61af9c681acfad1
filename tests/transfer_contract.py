"""What the contract tests of transfer and their two-process job share: every method, on a tiny folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor

import framework.modules  # noqa: F401  (every method is a subclass once it is imported)
from framework.datamodules import ImageFolderDataModule
from framework.modules import RegularizedTransfer, TransferClassifier
from framework.networks import resnet8
from framework.trainer import Trainer

CLASSES = ["ant", "bee", "cat"]
SMALL_TRANSFORMER: dict[str, Any] = {
    "backbone": "timm/vit_tiny_patch16_224",
    "backbone_options": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "weights": None,
}
# at batch 6 of 15 a part of the backbone begins to learn; with five steps an epoch that is in an epoch's middle
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen": {"policy": "frozen"},
    "gradual": {"policy": "gradual", "unfreeze_at": [0.2, 0.4, 0.6]},
    "lp_ft": {"policy": "lp_ft", "unfreeze_at": [0.4]},
    "lora": {"policy": "lora", **SMALL_TRANSFORMER},
    "layer_decay": {"layer_decay": 0.8, "optimizer": "AdamW", "learning_rate": 0.01},
    "source_statistics": {"batch_norm": "source_statistics"},
    "frozen_batch_norm": {"policy": "gradual", "unfreeze_at": [0.2, 0.4], "batch_norm": "frozen"},
}


class Case(NamedTuple):
    """A method and its options."""

    name: str
    method: type[TransferClassifier]
    options: dict[str, Any]


def methods(base: type[TransferClassifier] = TransferClassifier) -> list[type[TransferClassifier]]:
    """Every method: the base and its subclasses, but for bases that do not train."""
    found = [base] if base is TransferClassifier else []
    for cls in base.__subclasses__():
        trains = getattr(cls, "regularization", None) is not RegularizedTransfer.regularization
        if cls.__module__.startswith("framework.") and trains:
            found.append(cls)
        found += methods(cls)
    return sorted(set(found), key=lambda cls: cls.__name__)


def cases() -> list[Case]:
    """Every policy of the base, and every other method as it is by default."""
    others = [Case(method.__name__, method, {}) for method in methods() if method is not TransferClassifier]
    return [*(Case(name, TransferClassifier, options) for name, options in POLICIES.items()), *others]


def prepare(root: Path, images: Callable[..., Path]) -> Path:
    """Write what methods may need: images, weights with a classifier of five source classes, a teacher."""
    images(root / "images", CLASSES, count=13, seed=1)
    torch.manual_seed(5)
    source = resnet8(5)
    for name, value in source.state_dict().items():  # statistics as training leaves them
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    torch.save(source.state_dict(), root / "weights.pth")
    teacher = TransferClassifier(3, backbone="resnet8")
    Trainer(**QUIET, max_epochs=1, callbacks=SaveAt({1: root / "teacher.ckpt"})).fit(teacher, build_data(root))
    return root


def needs(root: Path) -> dict[str, Any]:
    """What is given to a method whose constructor asks for it by that name."""
    return {"teachers": [str(root / "teacher.ckpt")]}


def build_data(root: Path, **options: Any) -> ImageFolderDataModule:
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "steps_per_epoch": 5,
        "image_size": 16,
        "crop": "pad",
        "num_workers": 0,
    }
    return ImageFolderDataModule(str(root / "images"), **{**defaults, **options})


def build_model(case: Case, root: Path, **options: Any) -> TransferClassifier:
    defaults: dict[str, Any] = {
        "backbone": "resnet8",
        "weights": str(root / "weights.pth"),
        "bottleneck_features": 16,
        "bottleneck_dropout": 0.5,
        "learning_rate": 0.05,
        "backbone_learning_rate_factor": 0.5,
        "schedule": "inverse_decay",
    }
    known = inspect.signature(case.method.__init__).parameters
    defaults |= {name: value for name, value in needs(root).items() if name in known}
    return case.method(3, **{**defaults, **case.options, **options})


class SaveAt(L.Callback):
    """Writes checkpoints after numbers of batches, wherever in the epoch that is."""

    def __init__(self, paths: dict[int, Path]) -> None:
        self.paths, self.seen = paths, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen in self.paths:
            trainer.save_checkpoint(self.paths[self.seen])


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def fit(
    case: Case,
    root: Path,
    *,
    save: dict[int, Path] | None = None,
    resume: Path | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **trainer: Any,
) -> TransferClassifier:
    """Train a method on the tiny folder and return it; ``save`` says after which batches to write checkpoints."""
    L.seed_everything(0, verbose=False)
    module = build_model(case, root, **(model or {}))
    defaults = {**QUIET, "max_epochs": 3, "callbacks": [SaveAt(save)] if save else []}
    Trainer(**{**defaults, **trainer}).fit(module, build_data(root, **(data or {})), ckpt_path=resume)
    return module


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names of what is not equal bit for bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
