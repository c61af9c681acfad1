"""Geometry of training and evaluation images."""

from __future__ import annotations

import pytest
import torch

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
