"""The newest keys of each class, kept over many batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """Keys of past batches, the newest ``length`` of each class; an older one makes room. Part of the ``state_dict``.

    Args:
        num_classes: number of classes ``K``.
        length: keys a class, ``L``.
        features: width ``D`` of a key.

    Attributes:
        keys: shape ``[K, L, D]``; zeros where there is none yet.
        seen: how many keys of each class came so far, shape ``[K]``.
    """

    keys: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, length: int, features: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(num_classes, length, features))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.long))

    @property
    def filled(self) -> Tensor:
        """How many places of each class hold a key, the first ones, shape ``[K]``."""
        return self.seen.clamp(max=self.keys.shape[1])

    @torch.no_grad()
    def add(self, keys: Tensor, labels: Tensor) -> None:
        """Add keys ``[N, D]`` of classes ``[N]``, in their order; no transfer to the host.

        Of more than ``length`` keys of one class the last ones stay.
        """
        classes, length, _ = self.keys.shape
        before = (labels[:, None] == labels).tril(-1).sum(dim=1)  # of the same class, earlier in the batch
        places = labels * length + (self.seen[labels] + before) % length
        # where several would go to the same place, all of them write the last one: the order of writes is not fixed
        order = torch.arange(len(labels), device=labels.device)
        last = ((places[:, None] == places) * order).amax(dim=1)
        self.keys.view(classes * length, -1)[places] = keys[last].to(self.keys)
        self.seen.index_add_(0, labels, torch.ones_like(labels))
