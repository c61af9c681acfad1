"""The transforms of training and of evaluation: on uint8 tensors of one image; batches are normalised later."""

from __future__ import annotations

from typing import get_args

from torchvision.transforms import v2

from framework.datamodules.augmentation import AREAS, Augmentation, Crop, TrainingTransform
from framework.errors import ConfigurationError


def resized_side(image_size: int, resize_size: int, crop: Crop) -> int:
    """Height and width after the fixed resize that every transform begins with, in pixels.

    For ``random_resized`` and ``center`` the image is squared first, as in the published adaptation protocols.
    """
    return resize_size if crop in ("random_resized", "center") else image_size


def training_transform(
    image_size: int,
    resize_size: int,
    crop: Crop,
    horizontal_flip: bool,
    *,
    resized: bool = False,
    crop_scale: tuple[float, float] = AREAS,
    color_jitter: float = 0.0,
    grayscale: float = 0.0,
    blur: float = 0.0,
) -> TrainingTransform:
    """The random transform of a training image, uint8 ``[3, H, W]`` to uint8 ``[3, image_size, image_size]``.

    Colours and blur as in SimCLR (Chen et al., ICML 2020, appendix A), in its order.

    Args:
        image_size: height and width of the result in pixels.
        resize_size: the square that ``random_resized`` and ``center`` start from, in pixels.
        crop: ``random_resized`` (area ``crop_scale``, Szegedy 2015), ``pad`` (4 pixels of padding, then a random crop:
            He 2015 on CIFAR), ``center``, or ``none``.
        horizontal_flip: mirror half of the images.
        resized: leave out the fixed resize, for images that have its result's size, :func:`resized_side`, already.
        crop_scale: the least and the largest area of ``random_resized``, as shares of the image.
        color_jitter: strength ``s``: of 80 % of the images brightness, contrast and saturation are changed by up to
            ``0.8 s``, the hue by up to ``0.2 s``.
        grayscale: probability of taking the colours out.
        blur: probability of a Gaussian blur with a standard deviation of 0.1 to 2 pixels; its kernel is about a tenth
            of the image.
    """
    if crop not in get_args(Crop):
        raise ConfigurationError(
            f"Expected `--data.crop` to be 'random_resized', 'pad', 'center' or 'none', but got {crop!r}."
        )
    side = resized_side(image_size, resize_size, crop)
    return TrainingTransform(
        Augmentation(image_size, side, crop, horizontal_flip, crop_scale, color_jitter, grayscale, blur), resized
    )


def evaluation_transform(image_size: int, resize_size: int, crop: Crop, *, resized: bool = False) -> v2.Transform:
    """The fixed transform of an evaluated image: the middle of what training crops from.

    With ``resized`` without the fixed resize, as :func:`training_transform`.
    """
    steps = [] if resized else [v2.Resize((side := resized_side(image_size, resize_size, crop), side))]
    if crop in ("random_resized", "center"):
        steps.append(v2.CenterCrop(image_size))
    return v2.Compose(steps) if steps else v2.Identity()
