"""A network whose weights follow those of the one that learns."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MomentumCopy(nn.Module):
    """Copies of modules in a row, whose weights are moving averages of the originals' (He et al. 2020, MoCo).

    No gradient reaches them. Weights and averages are in the ``state_dict``. Batch-norm statistics are the copy's own:
    it runs in the modes of the originals.

    Args:
        originals: what is copied; the output of each is the input of the next.
        momentum: ``m`` of ``copy <- m copy + (1 - m) original``, in [0, 1].
    """

    def __init__(self, *originals: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        self.copies = nn.Sequential(*[copy.deepcopy(original) for original in originals]).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def follow(self, *originals: nn.Module) -> None:
        """One step towards the originals; with it, their modes."""
        for ours, original in zip(self.copies, originals, strict=True):
            for average, weight in zip(ours.parameters(), original.parameters(), strict=True):
                average.lerp_(weight, 1 - self.momentum)
            for module, model in zip(ours.modules(), original.modules(), strict=True):
                module.training = model.training

    def forward(self, inputs: Tensor) -> Tensor:
        """The output of the last copy, without a graph."""
        with torch.no_grad():
            output: Tensor = self.copies(inputs)
        return output
