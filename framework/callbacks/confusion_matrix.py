"""The confusion matrix of a test."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger
from torchmetrics import Metric


class ConfusionMatrix(L.Callback):
    """Writes ``confusion_matrix.csv`` beside the logs after a test, and a picture of it to TensorBoard.

    Rows are the true classes, columns the predicted ones, values counts; in the picture a row is scaled to its sum.
    """

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the counts of all processes and write them."""
        metric = getattr(pl_module, "test_confusion", None)
        if not isinstance(metric, Metric) or not trainer.loggers:
            return
        counts = metric.compute()
        folder = trainer.log_dir
        if not trainer.is_global_zero or folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        names = getattr(trainer.datamodule, "class_names", None) or [str(i) for i in range(len(counts))]  # type: ignore[attr-defined]
        with (Path(folder) / "confusion_matrix.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["true \\ predicted", *names])
            writer.writerows([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        cell = max(1, 256 // len(shares))
        picture = (1 - shares).repeat_interleave(cell, 0).repeat_interleave(cell, 1)[None]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("test/confusion_matrix", picture.cpu(), 0)
