"""Writing checkpoints: atomically, the last one and the best one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from framework.errors import ConfigurationError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint, flushes to disk and renames: a reader finds the old file or the new one.

    Lightning's own way goes through the temporary folder, and is cut short by a kill where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` at ``path``."""
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f".{final.name}.partial")  # one name: what a kill leaves, the next write replaces
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)


class RunCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` that knows its run again: Lightning's forgets the best score when the folder has moved, or
    is named by another path."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores; a checkpoint of another run leaves them as they are, and that run's files alone."""
        written, here = state_dict.get("dirpath"), self.dirpath
        best = state_dict["best_model_path"]
        if written and here and written != here and best and (Path(here) / Path(best).name).is_file():

            def moved(path: str) -> str:
                return str(Path(here) / Path(path).name) if path else path

            paths = {key: moved(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
            scores = {moved(path): score for path, score in state_dict["best_k_models"].items()}
            state_dict = state_dict | paths | {"best_k_models": scores, "dirpath": here}
        super().load_state_dict(state_dict)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save after a step, if steps say when to: to find out that none does takes Lightning's a while."""
        if self._every_n_train_steps > 0 or self._train_time_interval is not None:
            super().on_train_batch_end(trainer, pl_module, *args)


class LastCheckpoint(RunCheckpoint):
    """``checkpoints/last.ckpt``: the end of every epoch, and the batch at which a run was asked to stop (SIGTERM).

    Lightning's ``save_last`` follows the best checkpoint, and can be epochs old.

    Args:
        every_n_epochs: epochs between two writes; the end of the run is always written.
        every_n_train_steps: write every so many optimizer steps instead, and at the end of the run.
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
            save_on_train_epoch_end=True,  # by default only after a validation, which not every epoch may have
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save if it is time to, or if this is the end of the run."""
        super().on_train_epoch_end(trainer, pl_module)
        last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        if (last_epoch or last_step or trainer.should_stop) and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save at a stop that was asked for: there the batch is finished. An error may have struck in mid-step."""
        if isinstance(exception, SIGTERMException):
            super().on_exception(trainer, pl_module, exception)


class BestCheckpoint(RunCheckpoint):
    """``checkpoints/best.ckpt``: the epoch with the best value of what the module names as its monitor.

    For domain adaptation that is a score that needs no target labels.

    Args:
        monitor: a logged scalar; default: the module's ``monitor``.
        mode: ``min`` or ``max``, to be given with a ``monitor``; default: the module's.

    Raises:
        ConfigurationError: a monitor without a mode, or a mode without a monitor.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] | None = None) -> None:
        if (monitor is None) != (mode is None):
            raise ConfigurationError(
                "Expected `monitor` and `mode` ('min' or 'max') of BestCheckpoint to be given together, but got "
                f"monitor={monitor!r} and mode={mode!r}."
            )
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
        # without validation there is nothing to choose by, and without a monitor every epoch would be "best"; a name
        # that was given is left to Lightning, which complains where a validation does not log it
        given = self.chosen[0] is not None
        unknown = self.monitor is None or (not given and self.monitor not in trainer.callback_metrics)
        return unknown or super()._should_skip_saving_checkpoint(trainer)
