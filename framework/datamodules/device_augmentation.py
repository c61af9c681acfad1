"""Random views of a whole batch, on its device: what the loaders plan (``--data.augment_on device``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.datamodules.augmentation import ORDERS, Augmentation, View
from framework.datamodules.datasets import PlannedViews

GRAY = (0.2989, 0.587, 0.114)  # torchvision's


class DeviceAugmentation:
    """Makes the planned views of a batch: the same crops, flips and colours as on the loader's side.

    Pixels are not rounded to whole levels in between, so that a view differs from that of the loader by about a level
    of 255 where it is cropped and flipped only, and by a few where its colours are changed too. Everything is
    arithmetic on the batch: there is no random number, no loop over its images and no wait for the device.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation
        self._orders: dict[torch.device, Tensor] = {}

    def __call__(self, planned: PlannedViews) -> Tensor:
        """The views, floats from 0 to 255: ``[N, 3, H, W]``, several of each image ``[N, views, 3, H, W]``."""
        images, plans = planned
        count, views = plans.shape[:2]
        options = self.augmentation
        numbers = plans.view(torch.float32).flatten(0, 1).unbind(1)
        view = dict(zip(View._fields, numbers, strict=True))  # of each view: [M]
        result = self._cropped(images.float(), view, views)
        if options.color_jitter:
            result = self._jittered(result, view)
        if options.grayscale:
            result = torch.where(_images(view["gray"]) > 0, _gray(result), result)
        if options.blur:
            result = self._blurred(result, view["sigma"])
        return result if views == 1 else result.view(count, views, *result.shape[1:])

    def _cropped(self, images: Tensor, view: Mapping[str, Tensor], views: int) -> Tensor:
        """Crop and flip as two products with matrices of weights: resizing treats rows and columns separately."""
        size, side = self.augmentation.image_size, self.augmentation.side
        rows = _weights(view["top"], view["height"], size, side)
        columns = _weights(view["left"], view["width"], size, side)
        columns = torch.where(view["flip"][:, None, None] > 0, columns.flip(1), columns)
        images = images.contiguous().repeat_interleave(views, dim=0) if views > 1 else images.contiguous()
        return rows[:, None] @ images @ columns.transpose(1, 2)[:, None]

    def _jittered(self, images: Tensor, view: Mapping[str, Tensor]) -> Tensor:
        places = self._places(images.device)[view["order"].long() + 1]  # [M, 4]: the step at each place, 4 for none
        factors = torch.stack([view["brightness"], view["contrast"], view["saturation"]], dim=1)
        for step in places.unbind(1):
            factor = factors.gather(1, step.clamp(max=2)[:, None])[:, 0]
            factor = torch.where(step < 3, factor, torch.ones_like(factor))
            gray = _gray(images)
            towards = torch.where(_images(step) == 1, gray.mean(dim=(1, 2, 3), keepdim=True), gray)
            towards = torch.where(_images(step) == 0, torch.zeros_like(towards), towards)
            blend = torch.lerp(towards, images, _images(factor)).clamp(0, 255)
            # an image's hue has its turn at one of the four places; elsewhere it is turned by nothing
            images = torch.where(_images(step) == 3, _turned(images, _images(view["hue"])), blend)
        return images

    def _places(self, device: torch.device) -> Tensor:
        if device not in self._orders:  # once: a copy to the device makes the host wait
            self._orders[device] = torch.tensor([(4, 4, 4, 4), *ORDERS], device=device)
        return self._orders[device]

    def _blurred(self, images: Tensor, sigma: Tensor) -> Tensor:
        width = self.augmentation.kernel
        x = torch.arange(width, dtype=images.dtype, device=images.device) - width // 2
        weights = torch.exp(-0.5 * (x / sigma.clamp(min=1e-3)[:, None]).square())
        weights = torch.where(sigma[:, None] > 0, weights / weights.sum(1, keepdim=True), (x == 0).to(images.dtype))
        weights = weights.repeat_interleave(3, dim=0)[:, None]  # [3 M, 1, width]
        padded = F.pad(images, (width // 2,) * 4, mode="reflect").flatten(0, 1)[None]
        groups = len(weights)
        blurred = F.conv2d(F.conv2d(padded, weights[:, :, None], groups=groups), weights[..., None], groups=groups)
        return blurred.view(-1, 3, *blurred.shape[2:])


def _images(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _weights(first: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """How much each of ``side`` pixels has of each of ``size`` that a window becomes: ``[M, size, side]``.

    The triangle that torch's bilinear resize has with ``antialias``, cut off at the window.
    """
    target = torch.arange(size, dtype=first.dtype, device=first.device) + 0.5
    source = torch.arange(side, dtype=first.dtype, device=first.device) + 0.5
    first, length = first[:, None, None], length[:, None, None]
    scale = length / size
    center = first + scale * target[:, None]
    weights = (1 - (source - center).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = torch.where((source > first) & (source < first + length), weights, torch.zeros_like(weights))
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)  # a window's part outside stays black


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue)[:, None]


def _turned(images: Tensor, turn: Tensor) -> Tensor:
    """The colours turned on the circle of hues, lightest and darkest channel of each pixel as they are."""
    most, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = most - least
    red, green, blue = images.unbind(1)
    width = chroma[:, 0].clamp(min=1e-6)
    hue = torch.where(
        red == most[:, 0],
        (green - blue) / width,
        torch.where(green == most[:, 0], 2 + (blue - red) / width, 4 + (red - green) / width),
    )[:, None]  # in sixths of the circle
    channels = [(hue + 6 * turn + offset).remainder(6) for offset in (5, 3, 1)]
    return torch.cat([most - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in channels], dim=1)
