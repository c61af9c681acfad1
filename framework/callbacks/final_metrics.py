"""The hyperparameters with the final metrics, for TensorBoard's HPARAMS tab."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams as hparams_summary


class FinalMetrics(L.Callback):
    """Writes the last ``val/…`` values at the end of training, and ``test/…`` after a test, beside the hyperparameters.

    They are scalars of their own, ``final/val/…`` and ``final/test/…``: the HPARAMS tab shows the last value of each.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last validation."""
        self._write(trainer, pl_module, "val/")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the test."""
        self._write(trainer, pl_module, "test/")

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, prefix: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        metrics = {
            f"final/{name}": float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and metrics:
                write_hyperparameters(logger, dict(pl_module.hparams), metrics)


def write_hyperparameters(
    logger: TensorBoardLogger, parameters: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    """One session of the HPARAMS tab.

    ``TensorBoardLogger.log_hyperparams`` names only the metrics of its first call to the tab, so that a test that
    follows a fit would be missing there; here every session names those of validation and of test.
    """
    flat = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in parameters.items()
        if not name.startswith("_")
    }
    writer = logger.experiment
    known = logger.__dict__.setdefault("_final_metrics", {})
    known.update(metrics)
    for summary in hparams_summary(flat, dict(known)):  # type: ignore[no-untyped-call]
        writer._get_file_writer().add_summary(summary)
    for name, value in metrics.items():
        writer.add_scalar(name, value, 0)
    writer.flush()
