"""The progress bar, drawn no more often than one can see."""

from __future__ import annotations

import time

from lightning.pytorch.callbacks import TQDMProgressBar

SECONDS = 0.1  # between two drawings


class UnhurriedProgressBar(TQDMProgressBar):
    """Lightning's progress bar, drawn at most ten times a second and at the end of each loop.

    Drawing it takes as long as a whole step of a small network.

    Args:
        refresh_rate: batches from one drawing to the next, at least.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._drawn = 0.0

    def _should_update(self, current: int, total: int) -> bool:
        now = time.monotonic()
        if not super()._should_update(current, total) or (current != total and now - self._drawn < SECONDS):
            return False
        self._drawn = now
        return True
