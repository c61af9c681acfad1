"""Geometry and colours of training and evaluation images."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.datamodules import DomainPairDataModule, ImageFolderDataModule, UnlabelledFolderDataModule
from framework.datamodules.transforms import evaluation_transform, training_transform
from framework.errors import ConfigurationError

CROPS = ["random_resized", "pad", "center", "none"]
SHAPES = [(3, 17, 43), (3, 64, 21), (3, 32, 32), (3, 1, 1), (3, 300, 5)]


def noise(shape: tuple[int, ...] = (3, 40, 31)) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_size_and_type(crop: str, shape: tuple[int, ...]) -> None:
    for transform in (training_transform(29, 33, crop, True), evaluation_transform(29, 33, crop)):
        image = transform(noise(shape))
        assert image.shape == (3, 29, 29)
        assert image.dtype == torch.uint8


@pytest.mark.parametrize("crop", CROPS)
def test_evaluation_is_fixed_and_draws_nothing(crop: str) -> None:
    transform, image = evaluation_transform(24, 28, crop), noise()
    state = torch.get_rng_state()
    assert torch.equal(transform(image), transform(image))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("crop", CROPS)
def test_training_is_random_where_it_should_be(crop: str) -> None:
    transform, image = training_transform(24, 28, crop, False), noise()
    different = {transform(image).numpy().tobytes() for _ in range(50)}
    assert len(different) > 25 if crop in ("random_resized", "pad") else len(different) == 1


def test_flip_mirrors_half_of_the_images() -> None:
    transform, image = training_transform(40, 40, "none", True), noise((3, 40, 40))
    results = [transform(image) for _ in range(400)]
    mirrored = sum(torch.equal(result, image.flip(-1)) for result in results)
    assert mirrored + sum(torch.equal(result, image) for result in results) == 400
    assert 150 < mirrored < 250


def test_pad_crop_moves_by_up_to_four_pixels() -> None:
    transform, image = training_transform(16, 16, "pad", False), noise((3, 16, 16))
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    windows = {padded[:, y : y + 16, x : x + 16].numpy().tobytes(): (y, x) for y in range(9) for x in range(9)}
    positions = {windows[transform(image).numpy().tobytes()] for _ in range(1000)}
    assert len(positions) > 75  # of 81


def test_evaluation_takes_the_middle_of_the_square() -> None:
    image = noise((3, 28, 28))
    for crop in ("random_resized", "center"):
        assert torch.equal(evaluation_transform(24, 28, crop)(image), image[:, 2:26, 2:26])
    for crop in ("pad", "none"):
        assert torch.equal(evaluation_transform(28, 32, crop)(image), image)


def test_unknown_crop() -> None:
    with pytest.raises(ConfigurationError, match=r"`--data.crop` to be 'random_resized', .*, but got 'centre'"):
        training_transform(24, 28, "centre", True)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- colours, blur, and the area of a crop
ALL: dict[str, Any] = {"crop_scale": (0.3, 0.6), "color_jitter": 1.0, "grayscale": 0.3, "blur": 0.5}
OFF: dict[str, Any] = {"crop_scale": (0.08, 1.0), "color_jitter": 0.0, "grayscale": 0.0, "blur": 0.0}


@pytest.mark.parametrize("crop", CROPS)
def test_without_them_pixels_are_as_before_there_were_any(crop: str) -> None:
    image = noise()
    for seed in range(20):
        torch.manual_seed(seed)
        expected, state = training_transform(24, 28, crop, True)(image), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(training_transform(24, 28, crop, True, **OFF)(image), expected)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_size_and_type_with_all_of_them(crop: str, shape: tuple[int, ...]) -> None:
    for _ in range(5):
        image = training_transform(29, 33, crop, True, **ALL)(noise(shape))
        assert (image.shape, image.dtype) == ((3, 29, 29), torch.uint8)


def test_area_of_the_crop() -> None:
    ramp = torch.arange(200, dtype=torch.uint8)
    across = ramp.expand(200, 200)
    image = torch.stack([across, across.T, torch.zeros_like(across)])
    transform = training_transform(200, 200, "random_resized", False, crop_scale=(0.25, 0.5))
    areas = []
    for _ in range(300):
        x, y, _ = transform(image).float()
        areas.append(float((x.max() - x.min() + 1) * (y.max() - y.min() + 1)) / 200**2)
    assert 0.24 < min(areas) < 0.27
    assert 0.48 < max(areas) < 0.51


def jittered(color: tuple[int, int, int], strength: float, count: int = 600) -> torch.Tensor:
    """What becomes of an image of one colour: ``[count, 3]``."""
    transform = training_transform(4, 4, "none", False, color_jitter=strength)
    image = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    results = torch.stack([transform(image) for _ in range(count)])
    assert (results == results[:, :, :1, :1]).all()
    return results[:, :, 0, 0]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_strength_of_the_brightness(strength: float) -> None:
    """Of an even grey image contrast, saturation and hue are what they are: brightness alone can change it."""
    grey = jittered((100, 100, 100), strength)
    assert (grey == grey[:, :1]).all()
    low, high = 100 * (1 - 0.8 * strength), 100 * (1 + 0.8 * strength)
    # each of the four steps cuts off what is behind the point
    assert low - 3 <= grey.min() < low + 5 * strength
    assert high - 5 * strength < grey.max() <= high + 1


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_strength_of_the_hue(strength: float) -> None:
    """Brightness, contrast and saturation leave the hue of a colour as it is, which is 0 here."""
    hues = [colorsys.rgb_to_hsv(*rgb)[0] for rgb in jittered((120, 60, 60), strength).div(255.0).tolist()]
    turns = [(hue + 0.5) % 1 - 0.5 for hue in hues]
    for most in (-min(turns), max(turns)):
        assert 0.18 * strength < most < 0.2 * strength + 0.02  # 8 bits of a pale colour tell its hue to about 0.01


@pytest.mark.parametrize(("strength", "least", "most"), [(0.5, 0.6, 1.4), (2.0, 0.0, 2.6)])
def test_strength_of_contrast_and_saturation(strength: float, least: float, most: float) -> None:
    """Factors from ``1 - 0.8 s``, not below 0, to ``1 + 0.8 s``, each by itself, as torchvision's."""
    numbers = torch.rand(4000, 32, dtype=torch.float64)
    views = training_transform(4, 4, "none", False, color_jitter=strength).augmentation.views(numbers)
    jittered = views[views[:, 5] >= 0]
    for factors in jittered[:, 6:9].unbind(1):
        assert factors.min().item() == pytest.approx(least, abs=0.01)
        assert factors.max().item() == pytest.approx(most, abs=0.01)
        assert factors.mean().item() == pytest.approx((least + most) / 2, abs=0.05)
    assert jittered[:, 5:10].T.corrcoef().fill_diagonal_(0).abs().max() < 0.06
    assert jittered[:, 5].long().bincount().min() > 0.7 * len(jittered) / 24  # every order


def test_most_images_are_jittered() -> None:
    transform, image = training_transform(16, 16, "none", False, color_jitter=1.0), noise((3, 16, 16))
    same = sum(torch.equal(transform(image), image) for _ in range(600))
    assert 0.15 < same / 600 < 0.25  # a fifth is left alone


@pytest.mark.parametrize("probability", [0.2, 1.0])
def test_grey_images(probability: float) -> None:
    transform, image = training_transform(16, 16, "none", False, grayscale=probability), noise((3, 16, 16))
    luminance = (image.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=0)  # ITU-R 601
    grey = 0
    for _ in range(600):
        result = transform(image)
        if not torch.equal(result, image):
            assert (result.double() - luminance).abs().max() < 1.1  # cut off, and the weights are 0.9999 in all
            grey += 1
    assert abs(grey / 600 - probability) <= (0.05 if probability < 1 else 0)


@pytest.mark.parametrize(("size", "radius"), [(28, 1), (100, 5), (128, 6)])
def test_kernel_of_the_blur(size: int, radius: int) -> None:
    """Of a single bright point: how far it spreads, and how much of it is left."""
    transform, image = training_transform(size, size, "none", False, blur=1.0), torch.zeros(3, size, size)
    image[:, size // 2, size // 2] = 255
    results = torch.stack([transform(image.byte()) for _ in range(200)])
    lit = results.amax(dim=(0, 1)).nonzero() - size // 2
    assert lit.abs().max() == radius if size < 100 else 3 <= lit.abs().max() <= radius
    left = results[:, 0, size // 2, size // 2].float() / 255
    x = torch.arange(-radius, radius + 1).double()
    least = (1 / (-x.square() / (2 * 2.0**2)).exp().sum() ** 2).item()  # at the widest, 2 pixels
    assert least - 0.01 < left.min() < least + 0.03
    assert left.max() == 1  # at the narrowest, 0.1 pixels, nothing happens


def test_some_images_are_blurred() -> None:
    transform, image = training_transform(100, 100, "none", False, blur=0.3), noise((3, 100, 100))
    blurred = sum(transform(image).float().std() < 0.9 * image.float().std() for _ in range(300))
    assert 0.18 < float(blurred) / 300 < 0.36  # the narrowest ones change nothing


@pytest.mark.parametrize("name", ["ImageFolder", "DomainPair", "UnlabelledFolder"])
def test_every_datamodule_has_them(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_size": 24, "resize_size": 28, **ALL}
    data: Any = {
        "ImageFolder": lambda: ImageFolderDataModule("x", **options),
        "DomainPair": lambda: DomainPairDataModule("x", "y", **options),
        "UnlabelledFolder": lambda: UnlabelledFolderDataModule("x", **options),
    }[name]()
    image = noise()
    for seed in range(10):
        torch.manual_seed(seed)
        expected = training_transform(24, 28, "random_resized", True, **ALL)(image)
        torch.manual_seed(seed)
        assert torch.equal(data.train_transform(image), expected)
    assert torch.equal(data.eval_transform(image), evaluation_transform(24, 28, "random_resized")(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "`--data.crop_scale` to be two shares of the image's area, .* got .0.0, 1.0."),
        ({"crop_scale": (0.5, 0.2)}, "the smaller first, .* got .0.5, 0.2."),
        ({"crop_scale": (0.5, 1.2)}, "up to 1, but got .0.5, 1.2."),
        ({"crop_scale": [0.5]}, "`--data.crop_scale` to be two shares .* got .0.5."),
        ({"color_jitter": -0.1}, "`--data.color_jitter` to be from 0 to 2.5, but got -0.1"),
        ({"color_jitter": 2.6}, "`--data.color_jitter` to be from 0 to 2.5, but got 2.6"),
        ({"grayscale": 1.5}, "`--data.grayscale` to be a probability, from 0 to 1, but got 1.5"),
        ({"blur": -1}, "`--data.blur` to be a probability, from 0 to 1, but got -1"),
        ({"views": 0}, "`--data.views` to be at least 1, but got 0"),
    ],
)
def test_augmentations_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        UnlabelledFolderDataModule("x", **options)
    training_transform(24, 28, "none", False, color_jitter=2.5)(noise())  # the whole circle of hues
