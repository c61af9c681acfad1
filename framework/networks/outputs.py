"""What a network hands to a loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NetworkOutputs(NamedTuple):
    """One forward pass through backbone, bottleneck and head.

    Attributes:
        features: the bottleneck's output, shape ``[N, D]``.
        logits: the head's output, shape ``[N, K]``; never probabilities.
        labels: class indices ``[N]`` of source images in training; None for the target, which has none.
        domains: which source folder each image is from, ``[N]``; None for the target.
        images: what the network saw, ``[N, 3, H, W]``, in training: for losses that send other images, made of these,
            through it. With several processes these are the process's own, where all others are of all processes.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor | None = None
    domains: Tensor | None = None
    images: Tensor | None = None

    def split(self, first: int) -> tuple[NetworkOutputs, NetworkOutputs]:
        """The first ``first`` samples and the rest: source and target of one concatenated forward."""
        return (
            NetworkOutputs(self.features[:first], self.logits[:first]),
            NetworkOutputs(self.features[first:], self.logits[first:]),
        )
