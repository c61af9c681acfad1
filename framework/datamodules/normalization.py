"""From uint8 pixels to what a network takes, as a batch on its device."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalization:
    """``(pixels / 255 - mean) / std`` of each channel, and back.

    Images may have any dimensions before the last three, ``[..., 3, H, W]``. Those that come with the channels
    innermost in memory, as loaders serve them, keep that layout if they may: it costs nothing, where turning them costs
    as much as the normalisation.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def apply(
        self,
        images: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype,
        channels_last: bool = True,
    ) -> Tensor:
        """The images as normalised floats; those that are given are left as they are.

        Args:
            images: ``[..., 3, H, W]``, from 0 to 255.
            mean, std: of the three channels, for images in [0, 1].
            dtype: of the result.
            channels_last: whether the result may have the channels innermost in memory.
        """
        inner = images.movedim(-3, -1)
        if not channels_last or not inner.is_contiguous():
            images = images.to(dtype, memory_format=torch.contiguous_format, copy=True)
            return _normalize(images, *self._statistics(images, mean, std))
        # as rows of width x channels: with three channels innermost, arithmetic by channel costs four times as much
        rows = inner.flatten(-2)
        result = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        statistics = self._statistics(result, mean, std, images.shape[-1])
        if rows.device.type == "cpu" and rows.ndim > 2:  # what was just written is still in the processor's cache
            for source, target in zip(rows.flatten(0, -3), result.flatten(0, -3), strict=True):
                _normalize(target.copy_(source), *statistics)
        else:
            _normalize(result.copy_(rows), *statistics)
        return result.view(inner.shape).movedim(-1, -3)

    def invert(self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """The inverse, clipped to [0, 1]."""
        means, stds = self._statistics(images, mean, std)
        return (images * stds + means).clamp(0, 1)

    def _statistics(
        self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Columns of mean and standard deviation, or rows of them for a width."""
        key = (images.device, images.dtype, mean, std, width)
        if key not in self._rows:  # once: a copy to the device makes the host wait
            with torch.inference_mode(False):
                both = torch.tensor([mean, std], dtype=images.dtype, device=images.device)
                both = both.view(2, -1, 1, 1) if width is None else both.repeat(1, width)
            self._rows[key] = (both[0], both[1])
        return self._rows[key]


def _normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    # in place: the memory of each intermediate result costs more than its arithmetic
    return images.div_(255).sub_(mean).div_(std)


def takes_channels_last(module: nn.Module | None) -> bool:
    """Whether a module's convolutions have their weights with the channels innermost; True if there is no module."""
    if module is None:
        return True
    for weight in module.parameters():
        if weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[2:].numel() > 1:
            return weight.is_contiguous(memory_format=torch.channels_last)
    return False
