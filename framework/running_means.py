"""Running means of loss terms for the loggers."""

from __future__ import annotations

import lightning.pytorch as L
import torch
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

    @staticmethod
    def due(trainer: L.Trainer) -> bool:
        """Whether a row will be written at the end of this optimizer step: what is costly is measured in such a step
        alone."""
        every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return every != 0 and (_step(trainer) + 1) % every == 0

    def write(self, trainer: L.Trainer) -> dict[str, float]:
        """Write a row if one is due at this batch, and start the next means; returns the row, else nothing."""
        if not self.due(trainer) or trainer.fit_loop.epoch_loop._should_accumulate():
            return {}
        # brought to the host together: on an accelerator each reading waits for it
        on_device = next((total for total in self._sums.values() if total.device.type != "cpu"), torch.empty(0))
        totals = [total.detach().reshape(1).to(on_device.device) for total in self._sums.values()]
        values = torch.cat(totals).tolist() if totals else []
        row = {name: value / self._counts[name] for name, value in zip(self._sums, values, strict=True)}
        self._sums, self._counts = {}, {}
        if row:
            for logger in trainer.loggers:
                logger.log_metrics(row, _step(trainer))
        return row


def _step(trainer: L.Trainer) -> int:
    """The loggers' own x-axis; it stands still while gradients accumulate."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
