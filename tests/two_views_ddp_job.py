"""Run by ``pretraining/test_two_views_ddp.py`` in a process of its own: SimCLR and VICReg with two gloo processes.

Lightning starts the second process by running this file again. Usage: ``two_views_ddp_job.py OUTPUT``.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transfer_contract import QUIET

from framework import SimCLR, VICReg
from framework.batch import UnlabelledBatch
from framework.trainer import Trainer

METHODS = [SimCLR, VICReg]
# no batch norm: its statistics are each process's own, as under any DDP
OPTIONS: dict[str, Any] = {
    "backbone": "squeezenet1_1",
    "projection_features": 8,
    "projection_normalization": "none",
    "learning_rate": 0.01,
}


class Losses(L.Callback):
    """The training losses, as the step returned them."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(outputs["loss"].detach().clone())


def build(method: type[Any]) -> Any:
    """The same module each time."""
    L.seed_everything(0, verbose=False)
    return method(**OPTIONS)


def views() -> Tensor:
    """Four batches of eight images with two similar views each, ``[4, 8, 2, 3, 32, 32]``."""
    images = torch.randn(4, 8, 2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    images[:, :, 1] = images[:, :, 0] + 0.1 * images[:, :, 1]
    return images


class Views(L.LightningDataModule):
    """Views that are at hand, in batches."""

    views, batch_type = 2, UnlabelledBatch

    def __init__(self, train: Tensor, val: Tensor, batch_size: int, eval_batch_size: int = 2) -> None:
        super().__init__()
        self.train, self.val, self.batch_size, self.eval_batch_size = train, val, batch_size, eval_batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([UnlabelledBatch(pair) for pair in self.train], batch_size=self.batch_size)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([UnlabelledBatch(pair) for pair in self.val], batch_size=self.eval_batch_size)  # type: ignore[arg-type]


def train(method: type[Any], rank: int, processes: int, **trainer: Any) -> tuple[Any, Tensor]:
    """The module after four steps on 8 images each, of which a process sees its share, and the losses.

    One of two processes validates five images, two in a batch and one left over, the other two.
    """
    module = build(method)
    images = views().to(torch.float64 if trainer["precision"] == "64-true" else torch.float32)
    share = 8 // processes
    mine = images[:, rank * share : (rank + 1) * share].flatten(0, 1)
    val = images[0, :5] if rank == 0 else images[0, 5:7]
    losses = Losses()
    options = {**QUIET, "max_epochs": 1, "use_distributed_sampler": False, "callbacks": [losses], **trainer}
    Trainer(**options).fit(module, Views(mine, val, share))
    return module, torch.stack(losses.values)


def main(output: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    result: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        half, _ = train(method, rank, 2, strategy="ddp", devices=2, precision="bf16-mixed", limit_train_batches=1)
        module, losses = train(method, rank, 2, strategy="ddp", devices=2, precision="64-true")
        result[method.__name__] = {
            "weights": module.state_dict(),
            "losses": losses,
            "val/loss": module.trainer.callback_metrics["val/loss"],
            "bf16 val/loss": half.trainer.callback_metrics["val/loss"],
        }
    if rank == 0:
        torch.save(result, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
