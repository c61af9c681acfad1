"""From uint8 pixels to what a network takes, as a batch on its device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Pixels and channels that are normalised in one go on a CPU: few enough to be in the processor's cache still, and
# enough to ask seldom for Python's lock, which threads that make the next batches hold meanwhile
AT_ONCE = 1 << 20


class Normalization:
    """``(pixels / 255 - mean) / std`` of each channel, and back.

    Images may have any dimensions before the last three, ``[..., 3, H, W]``. Those that come with the channels
    innermost in memory, as loaders serve them, keep that layout if they may: it costs nothing, where turning them costs
    as much as the normalisation.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

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
        precise = dtype if dtype.itemsize >= 4 else torch.float32
        inner = images.movedim(-3, -1)
        if channels_last and inner.is_contiguous():
            # as rows of width x channels: with three channels innermost, arithmetic by channel costs four times as much
            rows = inner.flatten(-2)
            normalized = _affine(rows, *self._factors(rows.device, precise, mean, std, images.shape[-1]))
            result = normalized.view(inner.shape).movedim(-1, -3)
        else:
            result = _affine(images, *self._factors(images.device, precise, mean, std))
        return result.to(dtype)

    def invert(self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """The inverse, clipped to [0, 1]."""
        scale, shift = self._factors(images.device, images.dtype, mean, std)
        return ((images - shift) / (255 * scale)).clamp(0, 1)

    def _factors(
        self, device: torch.device, dtype: torch.dtype, mean: tuple[float, ...], std: tuple[float, ...], width: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel as columns, or with a width as rows."""
        key = (device, dtype, mean, std, width)
        if key not in self._known:  # once: a copy to the device makes the host wait
            with torch.inference_mode(False):
                scale = [1 / (255 * s) for s in std]
                both = torch.tensor([scale, [-m / s for m, s in zip(mean, std, strict=True)]], dtype=torch.float64)
                both = both.repeat(1, width) if width else both.view(2, -1, 1, 1)
                both = both.to(device, dtype)
            self._known[key] = (both[0], both[1])
        return self._known[key]


def _affine(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``images * scale + shift``, contiguous, in the dtype of the factors."""
    result = torch.empty(images.shape, dtype=scale.dtype, device=images.device)
    shape = (-1, *images.shape[images.ndim - (3 if scale.ndim == 3 else 2) :])
    sources: tuple[Tensor, ...] = (images.reshape(shape),)
    targets: tuple[Tensor, ...] = (result.view(shape),)
    if images.device.type == "cpu":
        count = max(1, AT_ONCE // max(1, targets[0].shape[1:].numel()))
        sources, targets = (torch.split(part[0], count) for part in (sources, targets))
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
        if scale.ndim == 3:  # a number for each channel: the fused kernel does not take it at full speed
            target.mul_(scale).add_(shift)
        else:
            torch.addcmul(shift, target, scale, out=target)
    return result


def takes_channels_last(module: nn.Module | None) -> bool:
    """Whether a module's convolutions have their weights with the channels innermost; True if there is no module."""
    if module is None:
        return True
    for weight in module.parameters():
        if weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[2:].numel() > 1:
            return weight.is_contiguous(memory_format=torch.channels_last)
    return False
