"""What the tests of LWF, Co-Tuning and Bi-Tuning share: weights with a classifier, tiny runs, the two-process job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from contract import SaveAt, weights
from torch import Tensor

from framework import ImageFolderDataModule, Trainer
from framework.networks import create_backbone

SOURCE_CLASSES = 5
CLASSES = 3


def write_weights(path: Path, backbone: str = "resnet8", classes: int = SOURCE_CLASSES) -> Path:
    """A state dict of a network with its classifier ``fc``, and with statistics of its own, as training leaves them."""
    torch.manual_seed(7)
    network = create_backbone(backbone)
    state: dict[str, Tensor] = network.state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    features = int(network.num_features)  # type: ignore[arg-type]
    state["fc.weight"], state["fc.bias"] = torch.randn(classes, features), torch.randn(classes)
    torch.save(state, path)
    return path


def build_data(root: Path, **options: Any) -> ImageFolderDataModule:
    """Three classes; 4 x 5 images an epoch."""
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "steps_per_epoch": 5,
        "image_size": 16,
        "crop": "pad",
        "num_workers": 0,
    }
    return ImageFolderDataModule(str(root), **{**defaults, **options})


def fit(
    build: Callable[[], L.LightningModule],
    root: Path,
    *,
    save: tuple[int, Path] | None = None,
    resume: Path | None = None,
    data: dict[str, Any] | None = None,
    **trainer: Any,
) -> Any:
    """Train what ``build`` makes on the folder and return it; with ``save`` a checkpoint is written on the way."""
    L.seed_everything(0, verbose=False)
    module = build()
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


def differing(first: torch.nn.Module, second: torch.nn.Module) -> list[str]:
    """Names in the state dicts whose values are not equal bit for bit; metrics aside."""
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    return [
        name
        for name, value in ours.items()
        if not name.startswith(("val_", "test_")) and not torch.equal(value, theirs[name])
    ]
