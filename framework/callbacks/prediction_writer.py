"""Predictions to a CSV file, one row an image."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes ``predictions.csv`` beside the logs: path, predicted class, its probability, all probabilities.

    With several processes each writes its share, and the first one joins them by path. An earlier file is kept; the new
    one is then ``predictions_1.csv`` and so on.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self._rows: list[list[Any]] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew: an earlier prediction may have ended in an error."""
        self._rows = []

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep a batch's rows."""
        names = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        for path, index, row in zip(
            prediction["paths"],
            prediction["classes"].tolist(),
            prediction["probabilities"].tolist(),
            strict=True,
        ):
            self._rows.append([path, names[index] if names else index, f"{row[index]:.6f}", *(f"{p:.6f}" for p in row)])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join the shares and write the file."""
        shares = [self._rows]
        self._rows = []
        if not trainer.loggers:
            return
        if trainer.world_size > 1:
            import torch.distributed

            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, shares[0])
            shares = gathered
        folder = trainer.log_dir
        if not trainer.is_global_zero or folder is None:
            return
        rows = sorted(row for share in shares for row in share)
        names = getattr(trainer.datamodule, "class_names", None) or [str(i) for i in range(len(rows[0]) - 3)]  # type: ignore[attr-defined]
        path, number = Path(folder) / "predictions.csv", 0
        while path.exists():
            number += 1
            path = path.with_name(f"predictions_{number}.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "class", "probability", *(f"probability of {name}" for name in names)])
            writer.writerows(rows)
        print(f"Predictions of {len(rows)} images: {os.path.relpath(path)}")
