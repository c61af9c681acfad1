"""How far a training run is, in batches.

The unit is the number of batches processed, never ``trainer.global_step``: that one stands still while gradients
accumulate and jumps when a step has several optimizers.
"""

from __future__ import annotations

import lightning.pytorch as L


def batches_processed(trainer: L.Trainer) -> int:
    """Training batches finished by each rank since the run began, resumed parts included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def batches_planned(trainer: L.Trainer) -> int | None:
    """Training batches of the whole run by ``max_epochs`` and ``max_steps``, or None if neither bounds it."""
    planned = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        planned.append(trainer.max_epochs * int(trainer.num_training_batches))
    if trainer.max_steps > 0:
        planned.append(trainer.max_steps * trainer.accumulate_grad_batches)
    return max(1, min(planned)) if planned else None
