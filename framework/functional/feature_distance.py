"""Squared distances between the feature maps of two networks, channel by channel."""

from __future__ import annotations

from torch import Tensor

from framework.functional.precision import full_precision


@full_precision
def channel_distances(maps: Tensor, source_maps: Tensor, channel_dimension: int = 1) -> Tensor:
    """Squared difference of each channel, averaged over images and positions.

    Args:
        maps: shape ``[N, C, ...]``, or ``[N, ..., C]`` with the channels elsewhere.
        source_maps: the same shape.
        channel_dimension: where the channels are.

    Returns:
        Shape ``[C]``.

    >>> channel_distances(torch.tensor([[[1.0, 3.0], [0.0, 0.0]]]), torch.zeros(1, 2, 2))
    tensor([5., 0.])
    """
    others = [dimension for dimension in range(maps.dim()) if dimension != channel_dimension % maps.dim()]
    return (maps - source_maps).square().mean(dim=others)
