"""A module that records what it is given."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor


class Recorder(L.LightningModule):
    """Keeps the batches of every loop, and one random number a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": [], "predict": []}
        self.random: list[float] = []
        self.arrived: list[torch.dtype] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images = batch[0]
        while not isinstance(images, Tensor):
            images = images[0]
        self.arrived.append(images.dtype)
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch)
        self.random.append(torch.rand(()).item())
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["val"].append((dataloader_idx, batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["predict"].append(batch)


def quiet(**options: Any) -> L.Trainer:
    """A Trainer that writes nothing."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**defaults, **options})


@pytest.fixture
def recorder() -> Recorder:
    """A fresh recorder."""
    return Recorder()


@pytest.fixture
def make_recorder() -> type[Recorder]:
    """For tests that need several."""
    return Recorder


@pytest.fixture
def trainer() -> Any:
    """The maker of quiet Trainers."""
    return quiet
