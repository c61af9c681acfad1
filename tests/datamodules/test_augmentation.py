"""The views against torchvision's own transforms: what is drawn, and what the pixels become."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from framework.datamodules.augmentation import NUMBERS, ORDERS, View, uniform_numbers
from framework.datamodules.transforms import training_transform

PLAIN = View(0, 0, 24, 24, 0, -1, 1, 1, 1, 0, 0, 0)


def noise(shape: tuple[int, ...] = (3, 40, 31)) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def drawn(count: int, **options: Any) -> torch.Tensor:
    numbers = torch.rand(count, NUMBERS, dtype=torch.float64)
    return training_transform(options.pop("size", 24), options.pop("side", 28), **options).augmentation.views(numbers)


# ---------------------------------------------------------------------- what is drawn
def distance(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    at = np.concatenate([ours, theirs])
    shares = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (ours, theirs)]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.mark.parametrize(
    ("side", "scale"), [(256, (0.08, 1.0)), (256, (0.85, 1.0)), (32, (0.2, 0.7)), (7, (0.01, 0.3))]
)
def test_crops_are_distributed_as_torchvisions(side: int, scale: tuple[float, float]) -> None:
    """Area, shape and place; with large areas most attempts fail, and some crops are the whole image."""
    count = 6000
    crop, image = v2.RandomResizedCrop(24, scale=scale), torch.empty(3, side, side)
    found = [crop.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in found], float)
    ours = drawn(count, side=side, crop="random_resized", horizontal_flip=False, crop_scale=scale)[:, :4].numpy()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= side).all()

    def quantities(windows: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        top, left, height, width = windows.T
        room_y, room_x = np.maximum(side - height, 1), np.maximum(side - width, 1)
        return [height * width, np.log(width / height), height, width, top, left, top / room_y, left / room_x]

    critical = 1.95 * math.sqrt(2 / count)  # at 0.1 %
    for number, (a, b) in enumerate(zip(quantities(ours), quantities(theirs), strict=True)):
        assert distance(a, b) < critical, number
    whole = [float((windows[:, 2:] == side).all(axis=1).mean()) for windows in (ours, theirs)]
    assert whole[0] == pytest.approx(whole[1], abs=0.03)
    if scale[0] > 0.8:
        assert whole[0] > 0.005


def test_the_largest_numbers_stay_inside() -> None:
    numbers = torch.full((1, NUMBERS), 1 - 2**-53, dtype=torch.float64)
    for side in (28, 29, 31, 200, 257, 1000):
        for crop, outside in (("random_resized", 0), ("pad", 4)):
            transform = training_transform(24, side, crop, True, crop_scale=(0.1, 0.2), color_jitter=1.0)
            view = View(*transform.augmentation.views(numbers)[0].tolist())
            assert view.top + view.height <= transform.augmentation.side + outside
            assert view.left + view.width <= transform.augmentation.side + outside
            assert view.order in (-1, 23)


def test_an_option_changes_no_other_one() -> None:
    numbers = torch.rand(200, NUMBERS, dtype=torch.float64)
    plain, full = (
        training_transform(24, 28, "random_resized", True, **options).augmentation.views(numbers)
        for options in ({}, {"color_jitter": 0.5, "grayscale": 0.5, "blur": 0.5})
    )
    assert torch.equal(plain[:, :5], full[:, :5])
    assert (plain[:, 5:] == torch.tensor(PLAIN[5:])).all()
    assert (full[:, 5:] != plain[:, 5:]).any(dim=0).all()


def test_numbers_are_those_of_torchs_generator() -> None:
    numbers = uniform_numbers([5, 2**62 + 1], views=3)
    for row, seed in zip(numbers, [5, 2**62 + 1], strict=True):
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3, NUMBERS, dtype=torch.float64), row)
    assert torch.equal(uniform_numbers([5], views=1)[0, 0], numbers[0, 0])  # the first view is that alone


# ---------------------------------------------------------------------- what the pixels become
@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(
    ("size", "window"),
    [
        (24, (2, 1, 20, 17)),  # smaller and larger than the result, the same, the whole, and a single pixel
        (24, (0, 3, 28, 25)),
        (24, (4, 4, 24, 24)),
        (24, (0, 0, 28, 28)),
        (24, (27, 0, 1, 1)),
        (9, (3, 5, 21, 22)),
        (28, (0, 0, 28, 28)),
    ],
)
def test_resized_crops_are_torchvisions_bit_for_bit(
    size: int, window: tuple[int, ...], innermost: bool, flip: int
) -> None:
    image = noise((3, 28, 28))
    if innermost:
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = functional.resized_crop(image, *window, [size, size], antialias=True)
    expected = functional.horizontal_flip(expected) if flip else expected
    transform = training_transform(size, 28, "random_resized", True)
    found = transform.view(image, View(*window, flip, *PLAIN[5:]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("top", range(-4, 5))
def test_padded_crops_are_torchvisions(top: int) -> None:
    image, transform = noise((3, 24, 24)), training_transform(24, 28, "pad", True)
    for left in range(-4, 5):
        expected = functional.crop(functional.pad(image, [4]), top + 4, left + 4, 24, 24)
        assert torch.equal(transform.view(image, PLAIN._replace(top=top, left=left)), expected)


@pytest.mark.parametrize("side", [28, 29, 30, 31])
def test_centers_are_torchvisions(side: int) -> None:
    image = noise()
    expected = v2.Compose([v2.Resize((side, side)), v2.CenterCrop(24)])(image)
    assert torch.equal(training_transform(24, side, "center", False)(image), expected)


@pytest.mark.parametrize("place", range(24))
def test_colors_in_every_order(place: int) -> None:
    image, transform = noise((3, 24, 24)), training_transform(24, 24, "none", False, color_jitter=1.0)
    steps = {
        0: lambda x: functional.adjust_brightness(x, 0.7),
        1: lambda x: functional.adjust_contrast(x, 1.4),
        2: lambda x: functional.adjust_saturation(x, 0.2),
        3: lambda x: functional.adjust_hue(x, 0.15),
    }
    expected = image
    for step in ORDERS[place]:
        expected = steps[step](expected)
    view = PLAIN._replace(order=place, brightness=0.7, contrast=1.4, saturation=0.2, hue=0.15)
    assert torch.equal(transform.view(image, view), expected)


def test_gray_and_blur_come_last() -> None:
    image, transform = noise((3, 24, 24)), training_transform(24, 24, "none", False, grayscale=0.5, blur=0.5)
    expected = functional.gaussian_blur(functional.rgb_to_grayscale(image, 3), [3, 3], [1.3, 1.3])
    assert torch.equal(transform.view(image, PLAIN._replace(gray=1, sigma=1.3)), expected)
