"""Quarter turns of images."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.errors import ConfigurationError


def quarter_turns(images: Tensor) -> Tensor:
    """Images turned by 0, 90, 180 and 270 degrees, counter-clockwise; no pixel is interpolated.

    Args:
        images: square, shape ``[N, C, S, S]``.

    Returns:
        Shape ``[4, N, C, S, S]``.

    Raises:
        ConfigurationError: images that are not square.

    >>> quarter_turns(torch.tensor([[[[1, 2], [3, 4]]]]))[:, 0, 0]
    tensor([[[1, 2],
             [3, 4]],
    <BLANKLINE>
            [[2, 4],
             [1, 3]],
    <BLANKLINE>
            [[4, 3],
             [2, 1]],
    <BLANKLINE>
            [[3, 1],
             [4, 2]]])
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ConfigurationError(f"Expected square images [N, C, S, S], but got {list(images.shape)}.")
    return torch.stack([torch.rot90(images, turns, dims=(2, 3)) for turns in range(4)])
