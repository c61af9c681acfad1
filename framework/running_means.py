"""Running means of loss terms for the loggers."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as L
import torch
from torch import Tensor

Measure = Callable[[Tensor], Tensor]
AT_ONCE = 16  # steps whose values are added up in one go: an operation costs a small step more than it does by itself


class RunningMeans:
    """Means of named scalars since the last row, handed to the loggers every ``trainer.log_every_n_steps`` batches.

    ``LightningModule.log`` costs a quarter of a millisecond for each key and step. This keeps the tensors, adds up
    those of some steps at once, and reads values back from the device only where a row is written.
    """

    def __init__(self) -> None:
        self._kept: list[dict[str, Tensor]] = []
        self._to_measure: dict[tuple[str, Measure], list[Tensor]] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one value a name; 0-d tensors, detached, that nobody writes to afterwards."""
        self._kept.append(values)
        if len(self._kept) == AT_ONCE:
            self._add_up()

    def add_measured(self, name: str, measure: Measure, inputs: Tensor) -> None:
        """Add the value that ``measure`` gives for ``inputs``, of which several steps' are measured at once.

        Args:
            name: of the value.
            measure: from inputs ``[steps, ...]`` to values ``[steps]``.
            inputs: of this step, detached; nobody writes to them afterwards.
        """
        kept = self._to_measure.setdefault((name, measure), [])
        if kept and kept[0].shape != inputs.shape:  # a last batch, of fewer images
            self._measure(name, measure, kept)
        kept.append(inputs)
        if len(kept) == AT_ONCE:
            self._measure(name, measure, kept)

    def means(self) -> dict[str, float]:
        """The means of all that was added since the last row."""
        self._add_up()
        for (name, measure), kept in self._to_measure.items():
            if kept:
                self._measure(name, measure, kept)
        # brought to the host together: on an accelerator each reading waits for it
        on_device = next((total for total in self._sums.values() if total.device.type != "cpu"), torch.empty(0))
        totals = [total.reshape(1).to(on_device.device) for total in self._sums.values()]
        values = torch.cat(totals).tolist() if totals else []
        return {name: value / self._counts[name] for name, value in zip(self._sums, values, strict=True)}

    def _add_up(self) -> None:
        columns: dict[str, list[Tensor]] = {}
        for values in self._kept:
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        self._kept.clear()
        for name, column in columns.items():
            self._add_to_sum(name, torch.stack(column))

    def _measure(self, name: str, measure: Measure, kept: list[Tensor]) -> None:
        inputs = torch.stack(kept)
        kept.clear()
        self._add_to_sum(name, measure(inputs))

    def _add_to_sum(self, name: str, values: Tensor) -> None:
        total = values.detach().float().sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + len(values)

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
        row = self.means()
        self._sums, self._counts = {}, {}
        if row:
            for logger in trainer.loggers:
                logger.log_metrics(row, _step(trainer))
        return row


def _step(trainer: L.Trainer) -> int:
    """The loggers' own x-axis; it stands still while gradients accumulate."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
