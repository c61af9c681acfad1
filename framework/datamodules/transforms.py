"""What happens to the pixels: geometry on uint8 tensors of one image, normalisation on the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from framework.errors import ConfigurationError

Crop = Literal["random_resized", "pad", "center", "none"]


def training_transform(image_size: int, resize_size: int, crop: Crop, horizontal_flip: bool) -> v2.Transform:
    """The random transform of a training image, uint8 ``[3, H, W]`` to uint8 ``[3, image_size, image_size]``.

    Args:
        image_size: height and width of the result in pixels.
        resize_size: the square that ``random_resized`` and ``center`` start from, in pixels.
        crop: ``random_resized`` (area 8 to 100 %, Szegedy 2015), ``pad`` (4 pixels of padding, then a random crop: He
            2015 on CIFAR), ``center``, or ``none``.
        horizontal_flip: mirror half of the images.
    """
    steps: list[v2.Transform] = []
    if crop == "random_resized":
        # squared first, as in the published adaptation protocols
        steps += [v2.Resize((resize_size, resize_size)), v2.RandomResizedCrop(image_size, antialias=True)]
    elif crop == "center":
        steps += [v2.Resize((resize_size, resize_size)), v2.CenterCrop(image_size)]
    elif crop == "pad":
        steps += [v2.Resize((image_size, image_size)), v2.RandomCrop(image_size, padding=4)]
    elif crop == "none":
        steps += [v2.Resize((image_size, image_size))]
    else:
        raise ConfigurationError(
            f"Expected `--data.crop` to be 'random_resized', 'pad', 'center' or 'none', but got {crop!r}."
        )
    if horizontal_flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


class Views(v2.Transform):  # type: ignore[misc]
    """Several random views of one image: uint8 ``[3, H, W]`` to ``[views, 3, image_size, image_size]``.

    The first one is the view that the transform alone would make from the same random numbers.

    Args:
        transform: the random transform.
        views: how many.
    """

    def __init__(self, transform: v2.Transform, views: int) -> None:
        super().__init__()
        self.view, self.views = transform, views

    def forward(self, image: Tensor) -> Tensor:
        """The views, stacked."""
        return torch.stack([self.view(image) for _ in range(self.views)])


def evaluation_transform(image_size: int, resize_size: int, crop: Crop) -> v2.Transform:
    """The fixed transform of an evaluated image: the middle of what training crops from."""
    if crop in ("random_resized", "center"):
        return v2.Compose([v2.Resize((resize_size, resize_size)), v2.CenterCrop(image_size)])
    return v2.Compose([v2.Resize((image_size, image_size))])
