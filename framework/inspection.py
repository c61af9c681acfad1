"""Looking at a network in the middle of its training, without a trace in what follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Within this context ``module`` is in eval mode and nothing has a gradient.

    Afterwards the modes of all its parts and the state of all random generators are as before.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        with isolate_rng(), torch.no_grad():
            module.eval()
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def epoch_is_due(trainer: L.Trainer, every_n_epochs: int) -> bool:
    """Whether the validation that runs is one of every n-th epoch, or of the last as far as it is known beforehand."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return (trainer.current_epoch + 1) % every_n_epochs == 0 or last_epoch or last_step
