"""A network as it was, beside the one that learns."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class FrozenCopy(nn.Module):
    """A copy of a module that never changes: no gradients, evaluation mode whatever its parent is in.

    Its weights are part of the ``state_dict``, so that a resumed run compares with what the first one started from.

    Args:
        original: what is copied.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(original).requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> FrozenCopy:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, *inputs: Any) -> Any:
        """The original's output, without a graph."""
        with torch.no_grad():
            return self.module(*inputs)
