"""Running means of loss terms for the loggers."""

from __future__ import annotations

import lightning.pytorch as L
from torch import Tensor


class RunningMeans:
    """Means of named scalars since the last row, handed to the loggers every ``trainer.log_every_n_steps`` batches.

    ``LightningModule.log`` costs a quarter of a millisecond for each key and step; this adds a tensor to a tensor, and
    reads values back from the device only where a row is written.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one value a name; 0-d tensors, detached."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def write(self, trainer: L.Trainer) -> dict[str, float]:
        """Write a row if one is due at this batch, and start the next means; returns the row, else nothing."""
        loop = trainer.fit_loop.epoch_loop
        step = loop._batches_that_stepped  # the loggers' own x-axis; it stands still while gradients accumulate
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or (step + 1) % every != 0 or loop._should_accumulate():
            return {}
        row = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        if row:
            for logger in trainer.loggers:
                logger.log_metrics(row, step)
        return row
