"""Random views of training images: which random numbers a view is made of, and the view of one image that they make.

A view takes :data:`NUMBERS` uniform numbers, of which each option has its own places, so that blur, say, changes no
crop. What they mean is written in a row of numbers (:class:`View`), with which the view can be made here, image by
image, or of a whole batch on its device (:mod:`~framework.datamodules.device_augmentation`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as pixels

Crop = Literal["random_resized", "pad", "center", "none"]
AREAS = (0.08, 1.0)  # Szegedy 2015
RATIOS = (3 / 4, 4 / 3)  # width to height, the same
NUMBERS = 32
ATTEMPTS = 10  # at a crop that fits, as torchvision's
PADDING = 4  # pixels: He 2015 on CIFAR
ORDERS = tuple(permutations(range(4)))  # of brightness, contrast, saturation and hue


class View(NamedTuple):
    """What is done to an image that has been resized to a square already.

    Attributes:
        top, left, height, width: the window, in pixels; what lies outside the image is black.
        flip: 1 to mirror it.
        order: the place in :data:`ORDERS`, or -1 for the colours as they are.
        brightness, contrast, saturation: factors.
        hue: by how much it is turned, 1 for the whole circle.
        gray: 1 to take the colours out.
        sigma: standard deviation of the blur in pixels; 0 for none.
    """

    top: float
    left: float
    height: float
    width: float
    flip: float
    order: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    gray: float
    sigma: float


@dataclass(frozen=True)
class Augmentation:
    """The distribution of views.

    Attributes:
        image_size: height and width of a view in pixels.
        side: those of the resized image.
        options: as :func:`~framework.datamodules.transforms.training_transform` describes them.
    """

    image_size: int
    side: int
    crop: Crop
    horizontal_flip: bool
    crop_scale: tuple[float, float] = AREAS
    color_jitter: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0

    @property
    def kernel(self) -> int:
        """Width of the blur's kernel in pixels, odd, about a tenth of the image."""
        return max(3, self.image_size // 10 | 1)

    def views(self, numbers: Tensor) -> Tensor:
        """The views that uniform numbers mean.

        Args:
            numbers: ``[M, 32]``, float64, in [0, 1).

        Returns:
            A :class:`View` in each row, ``[M, 12]``, float64.
        """
        drawn = numbers.numpy()
        views = np.zeros((len(drawn), len(View._fields)))
        views[:, :4] = self._windows(drawn)
        views[:, 4] = (drawn[:, 22] < 0.5) & self.horizontal_flip
        views[:, 5:9] = -1, 1, 1, 1
        if self.color_jitter:
            most = 0.8 * self.color_jitter
            least = max(0.0, 1 - most)
            jittered = drawn[:, 23] < 0.8
            views[:, 5] = np.where(jittered, np.floor(drawn[:, 24] * len(ORDERS)), -1)
            views[:, 6:9] = np.where(jittered[:, None], least + (1 + most - least) * drawn[:, 25:28], 1)
            views[:, 9] = np.where(jittered, 0.2 * self.color_jitter * (2 * drawn[:, 28] - 1), 0)
        views[:, 10] = drawn[:, 29] < self.grayscale
        views[:, 11] = np.where(drawn[:, 30] < self.blur, 0.1 + 1.9 * drawn[:, 31], 0)
        return torch.from_numpy(views)

    def _windows(self, drawn: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        windows = np.zeros((len(drawn), 4))
        windows[:, 2:] = self.image_size
        if self.crop == "center":
            windows[:, :2] = round((self.side - self.image_size) / 2)
        elif self.crop == "pad":
            windows[:, :2] = np.floor(drawn[:, 20:22] * (2 * PADDING + 1)) - PADDING
        elif self.crop == "random_resized":
            tried = drawn[:, :20].reshape(-1, ATTEMPTS, 2)
            least, most = self.crop_scale
            area = self.side**2 * (least + (most - least) * tried[..., 0])
            low, high = (math.log(ratio) for ratio in RATIOS)
            ratio = np.exp(low + (high - low) * tried[..., 1])
            sizes = np.rint(np.sqrt(np.stack([area / ratio, area * ratio], axis=-1)))
            fits = np.all((sizes > 0) & (sizes <= self.side), axis=-1, keepdims=True)
            rows, first = np.arange(len(drawn)), fits[..., 0].argmax(axis=1)
            size = np.where(fits[rows, first], sizes[rows, first], self.side)
            room = self.side - size
            windows[:, :2] = np.minimum(np.floor(drawn[:, 20:22] * (room + 1)), room)  # a product may be rounded up
            windows[:, 2:] = size
        return windows


class TrainingTransform(v2.Transform):  # type: ignore[misc]
    """The random transform of a training image, uint8 ``[3, H, W]`` to uint8 ``[3, image_size, image_size]``.

    Called by hand it draws from torch's generator, ``torch.rand(32, dtype=torch.float64)``; loaders draw the same
    numbers from a generator of their own with the seed of each draw.

    Args:
        augmentation: the distribution of the views.
        resized: leave out the fixed resize, for images of ``augmentation.side`` already.
    """

    def __init__(self, augmentation: Augmentation, resized: bool = False) -> None:
        super().__init__()
        self.augmentation, self.resized = augmentation, resized

    def forward(self, image: Tensor) -> Tensor:
        """One view."""
        numbers = torch.rand(1, NUMBERS, dtype=torch.float64)
        return self.view(self.resize(image), View(*self.augmentation.views(numbers)[0].tolist()))

    def resize(self, image: Tensor) -> Tensor:
        """The fixed resize to a square, with which every view begins."""
        resized: Tensor = image if self.resized else pixels.resize(image, [self.augmentation.side] * 2)
        return resized

    def view(self, image: Tensor, view: View) -> Tensor:
        """A view of a resized image, uint8 ``[3, side, side]`` to ``[3, image_size, image_size]``."""
        size = self.augmentation.image_size
        out = torch.empty(1, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        self.put_view(image, view, out)
        return out[0]

    def put_view(self, image: Tensor, view: View, out: Tensor) -> None:
        """Put a view of a resized image into ``out``, ``[1, 3, image_size, image_size]`` with the channels innermost in
        memory."""
        self._cut(image, view, out)
        if view.order >= 0:
            for step in ORDERS[int(view.order)]:
                out.copy_(_COLORS[step](out, view[6 + step]))
        if view.gray:
            out.copy_(pixels.rgb_to_grayscale(out, num_output_channels=3))
        if view.sigma:
            out.copy_(pixels.gaussian_blur(out, [self.augmentation.kernel] * 2, [view.sigma] * 2))

    def _cut(self, image: Tensor, view: View, out: Tensor) -> None:
        size, side = self.augmentation.image_size, self.augmentation.side
        top, left, height, width = (int(place) for place in view[:4])
        if top < 0 or left < 0 or top + height > side or left + width > side:
            image = F.pad(image, (PADDING,) * 4)
            top, left = top + PADDING, left + PADDING
        # a part of the array: a part of the tensor takes longer, and asks for Python's lock four times
        window = torch.from_numpy(image.numpy()[None, :, top : top + height, left : left + width])
        if view.flip:  # here, where it is the smaller image
            window = window.flip(-1)
        if height == width == size:
            out.copy_(window)
            return
        # what torch.nn.functional.interpolate calls, but into the batch: by way of `torch.ops` threads wait longer for
        # each other. With the channels innermost torch's kernel for uint8 takes a third of the time
        window = window.contiguous(memory_format=torch.channels_last)
        resize: Any = torch._C._nn._upsample_bilinear2d_aa
        resize(window, [size, size], False, None, None, out=out)


_COLORS = (pixels.adjust_brightness, pixels.adjust_contrast, pixels.adjust_saturation, pixels.adjust_hue)


def uniform_numbers(seeds: Sequence[int], views: int) -> Tensor:
    """The numbers of the views of each image: ``[N, views, 32]``, float64, each image's from its seed alone."""
    generator = torch.Generator()  # not the run's, which another thread may be using
    numbers = torch.empty(len(seeds), views, NUMBERS, dtype=torch.float64)
    for row, seed in zip(numbers, seeds, strict=True):
        row.uniform_(generator=generator.manual_seed(seed))
    return numbers
