"""Masks of image blocks, and the loss of predicting what is under them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.precision import full_precision

Norm = Literal["l1", "l2"]


def random_block_mask(
    count: int, image_size: tuple[int, int], block: int, ratio: float, device: torch.device | str | None = None
) -> Tensor:
    """Which blocks of each image are masked: ``round(ratio * blocks)`` of every one, all choices equally likely.

    Drawn from the default generator of ``device``.

    Args:
        count: number of images ``N``.
        image_size: height and width in pixels. Where they are no multiple of ``block``, the last blocks are cut.
        block: height and width of a block in pixels.
        ratio: share of the blocks to mask, in (0, 1).
        device: of the mask.

    Returns:
        True where masked, shape ``[N, ceil(height / block), ceil(width / block)]``.

    Raises:
        ConfigurationError: a block larger than the image, or no block, or every block, would be masked.

    >>> random_block_mask(5, (192, 192), block=32, ratio=0.6).sum(dim=(1, 2))
    tensor([22, 22, 22, 22, 22])
    """
    height, width = image_size
    if not 1 <= block <= min(height, width):
        raise ConfigurationError(
            f"Expected `--model.block_size` to be from 1 to the {min(height, width)} pixels of an image, but got "
            f"{block}."
        )
    rows, columns = -(-height // block), -(-width // block)
    masked = round(ratio * rows * columns)
    if not 0 < masked < rows * columns:
        raise ConfigurationError(
            f"Expected `--model.block_size` and `--model.mask_ratio` to mask some blocks of an image and leave some "
            f"visible, but {ratio} of {rows} x {columns} blocks of {block} pixels is {masked}. Make the blocks smaller."
        )
    order = torch.rand(count, rows * columns, device=device).argsort(dim=1)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :masked], True)
    return mask.view(count, rows, columns)


def mask_of_pixels(blocks: Tensor, image_size: tuple[int, int], block: int) -> Tensor:
    """A mask of blocks ``[N, h, w]`` as one of pixels ``[N, 1, H, W]``; the last blocks are cut at the image's edge.

    >>> mask_of_pixels(torch.tensor([[[True, False], [False, True]]]), (3, 4), block=2).int()
    tensor([[[[1, 1, 0, 0],
              [1, 1, 0, 0],
              [0, 0, 1, 1]]]], dtype=torch.int32)
    """
    height, width = image_size
    return blocks.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)[:, None, :height, :width]


@full_precision
def masked_reconstruction_loss(prediction: Tensor, target: Tensor, mask: Tensor, norm: Norm = "l1") -> Tensor:
    """Mean error over the masked pixels and their channels; visible pixels play no part (Xie et al. 2022, SimMIM).

    Args:
        prediction: shape ``[N, C, H, W]``.
        target: the same shape.
        mask: True where an error counts, shape ``[N, 1, H, W]``.
        norm: ``l1``, absolute errors, as in SimMIM, or ``l2``, squared errors, as in Pathak et al. 2016.

    Returns:
        0-d tensor; 0 where nothing is masked.

    >>> prediction, target = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[[[1.0, 4.0, 9.0]]]])
    >>> masked_reconstruction_loss(prediction, target, torch.tensor([[[[True, True, False]]]]))
    tensor(1.)
    >>> masked_reconstruction_loss(prediction, target, torch.tensor([[[[True, True, False]]]]), norm="l2")
    tensor(2.)
    """
    elementwise = F.l1_loss if norm == "l1" else F.mse_loss
    errors = elementwise(prediction, target, reduction="none").masked_fill(~mask, 0.0)
    return errors.sum() / (mask.sum() * prediction.shape[1]).clamp(min=1)
