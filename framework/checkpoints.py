"""Writing checkpoints: atomically, the last one and the best one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint, flushes to disk and renames: a reader finds the old file or the new one.

    Lightning's own way goes through the temporary folder, and is cut short by a kill where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` at ``path``."""
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)


class LastCheckpoint(ModelCheckpoint):
    """``checkpoints/last.ckpt``: the end of every epoch, and the batch at which a run was asked to stop (SIGTERM).

    Lightning's ``save_last`` follows the best checkpoint, and can be epochs old.

    Args:
        every_n_epochs: epochs between two writes.
        every_n_train_steps: write every so many optimizer steps instead.
    """

    def __init__(self, every_n_epochs: int | None = None, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            filename="last",
            monitor=None,
            save_top_k=1,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            auto_insert_metric_name=False,
            save_on_exception=True,
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save at a stop that was asked for: there the batch is finished. An error may have struck in mid-step."""
        if isinstance(exception, SIGTERMException):
            super().on_exception(trainer, pl_module, exception)


class BestCheckpoint(ModelCheckpoint):
    """``checkpoints/best.ckpt``: the epoch with the best value of what the module names as its monitor.

    For domain adaptation that is a score that needs no target labels.

    Args:
        monitor: a logged scalar; default: the module's ``monitor``.
        mode: ``min`` or ``max``; default: the module's.
    """

    def __init__(self, monitor: str | None = None, mode: str | None = None) -> None:
        self.chosen = (monitor, mode)
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode or "max",
            save_top_k=1,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the module's monitor where none was given."""
        monitor, mode = getattr(pl_module, "monitor", (None, "max"))
        self.monitor, self.mode = self.chosen[0] or monitor, self.chosen[1] or mode
        self.kth_value = torch.tensor(float("inf" if self.mode == "min" else "-inf"))
        super().setup(trainer, pl_module, stage)

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        # without validation there is nothing to choose by, and without a monitor every epoch would be "best"
        unknown = self.monitor is None or self.monitor not in trainer.callback_metrics
        return unknown or super()._should_skip_saving_checkpoint(trainer)
