"""Masked image reconstruction: what is under the masked blocks of an image?

Pathak et al., "Context Encoders: Feature Learning by Inpainting", CVPR 2016, arXiv:1604.07379; Xie et al., "SimMIM: a
Simple Framework for Masked Image Modeling", CVPR 2022, arXiv:2111.09886.
"""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.functional import masked_reconstruction_loss
from framework.functional.masking import Norm, mask_of_pixels, random_block_mask
from framework.modules.pretraining.base import Encoder, PretextTask, PretrainingModule, Preview
from framework.networks.spatial_maps import SpatialMaps


class MaskedImageTask(PretextTask):
    """Error of the masked pixels, predicted from the visible ones, for any backbone with a spatial map.

    Masked blocks are replaced in the image by a learned one, which starts as the mean colour. For a transformer whose
    patches of ``p`` pixels divide the block this is SimMIM's learned token, one for each place in the block, as far as
    the patch embedding reaches: everywhere, where it is no wider than the patch's ``3 p^2`` numbers. A linear layer
    predicts, from each position of the map, the ``stride`` by ``stride`` pixels that the position stands for.

    Diagnostics: ``masked_error``, the loss, and ``relative_error``, the loss over that of painting the mean colour of
    the image's visible pixels: 1 is no better than that.

    Args:
        backbone: where the map is caught; it is no part of the task. ``encode`` must run it.
        block_size: height and width of a block in pixels.
        mask_ratio: share of the blocks that are masked, in (0, 1).
        norm: ``l1``, mean absolute error (SimMIM), or ``l2``, mean squared error (Pathak 2016).
    """

    changes_images: ClassVar[bool] = True

    def __init__(
        self, backbone: nn.Module, *, block_size: int = 32, mask_ratio: float = 0.6, norm: Norm = "l1"
    ) -> None:
        super().__init__()
        if block_size < 1:
            raise ConfigurationError(f"Expected `--model.block_size` to be at least 1, but got {block_size}.")
        if not 0 < mask_ratio < 1:
            raise ConfigurationError(f"Expected `--model.mask_ratio` to be above 0 and below 1, but got {mask_ratio}.")
        if norm not in get_args(Norm):
            raise ConfigurationError(f"Expected `--model.norm` to be 'l1' or 'l2', but got {norm!r}.")
        self.block_size, self.mask_ratio, self.norm = block_size, mask_ratio, norm
        self.maps = SpatialMaps(backbone)
        self.masked_block = nn.Parameter(torch.zeros(3, block_size, block_size))
        self.decoder = nn.Conv2d(self.maps.channels, 3 * self.maps.stride**2, kernel_size=1)

    def forward(self, encode: Encoder, images: Tensor) -> Tensor:
        """Mean error over the masked pixels of all images, a scalar."""
        mask = self.mask(images)
        loss = masked_reconstruction_loss(self.reconstruction(encode, images, mask), images, mask, self.norm)
        mean_colour = (images * ~mask).sum(dim=(2, 3), keepdim=True) / (~mask).sum(dim=(2, 3), keepdim=True)
        baseline = masked_reconstruction_loss(mean_colour.expand_as(images), images, mask, self.norm)
        relative = loss.detach() / baseline.clamp(min=1e-6)  # of images of one colour
        self.diagnostics = {"masked_error": loss.detach(), "relative_error": relative}
        return loss

    def mask(self, images: Tensor) -> Tensor:
        """Which pixels of images ``[N, 3, H, W]`` to mask, drawn anew: ``[N, 1, H, W]``."""
        size = (images.shape[2], images.shape[3])
        blocks = random_block_mask(len(images), size, self.block_size, self.mask_ratio, images.device)
        return mask_of_pixels(blocks, size, self.block_size)

    def masked(self, images: Tensor, mask: Tensor) -> Tensor:
        """Images whose masked blocks are replaced by the learned one."""
        height, width = images.shape[2:]
        repeats = (1, -(-height // self.block_size), -(-width // self.block_size))
        replacement = self.masked_block.to(images.dtype).repeat(repeats)[:, :height, :width]
        return torch.where(mask, replacement, images)

    def reconstruction(self, encode: Encoder, images: Tensor, mask: Tensor) -> Tensor:
        """All pixels as predicted from the visible ones, ``[N, 3, H, W]``."""
        with self.maps.recording():
            encode(self.masked(images, mask))
            maps = self.maps.last()
        stride, (height, width) = self.maps.stride, images.shape[2:]
        pixels = F.pixel_shuffle(self.decoder(maps), stride)
        if maps.shape[2:] == (-(-height // stride), -(-width // stride)):
            return pixels[:, :, :height, :width]  # the last positions of the map look over the edge
        return F.interpolate(pixels, size=(height, width), mode="bilinear")

    def preview(self, encode: Encoder, images: Tensor) -> Preview:
        """Each image, what the network sees of it, and the masked blocks as predicted among the visible pixels."""
        mask = self.mask(images)
        predicted = self.reconstruction(encode, images, mask).to(images.dtype)
        pictures = torch.stack([images, self.masked(images, mask), torch.where(mask, predicted, images)], dim=1)
        return Preview(pictures.detach(), [["image", "masked", "reconstruction"] for _ in images])


class MaskedImageReconstruction(PretrainingModule):
    """Pre-training by reconstructing masked blocks of an image, as in SimMIM (Xie et al., CVPR 2022).

    The pixels are predicted from the backbone's last spatial map, so that layers behind it (the linear ones of VGG or
    MobileNetV3) do not learn; with those, several processes need ``--trainer.strategy
    ddp_find_unused_parameters_true``.

    Args:
        block_size: height and width in pixels of the blocks that are masked; a sixth of the image in SimMIM.
        mask_ratio: share of the blocks that are masked.
        norm: ``l1`` (SimMIM) or ``l2`` (context encoders) of the errors.
        options: those of :class:`~framework.modules.pretraining.PretrainingModule`.
    """

    def __init__(self, *, block_size: int = 32, mask_ratio: float = 0.6, norm: Norm = "l1", **options: Any) -> None:
        super().__init__(**options)
        self.task = MaskedImageTask(self.backbone, block_size=block_size, mask_ratio=mask_ratio, norm=norm)
