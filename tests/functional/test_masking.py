"""Masks of blocks: how many, where, how often; and the loss of what is under them against a loop."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch
from torch import Tensor

import framework.functional.masking
from framework.errors import ConfigurationError
from framework.functional import mask_of_pixels, masked_reconstruction_loss, random_block_mask


@pytest.mark.parametrize(
    ("size", "block", "ratio", "shape", "masked"),
    [
        ((192, 192), 32, 0.6, (6, 6), 22),
        ((16, 16), 4, 0.5, (4, 4), 8),
        ((17, 9), 4, 0.4, (5, 3), 6),
        ((5, 2), 2, 0.34, (3, 1), 1),
        ((8, 8), 4, 0.9, (2, 2), None),
    ],
)
def test_as_many_blocks_of_every_image(
    size: tuple[int, int], block: int, ratio: float, shape: tuple[int, int], masked: int | None
) -> None:
    if masked is None:  # round(0.9 * 4) is all of them
        with pytest.raises(ConfigurationError, match=r"`--model\.block_size`.*`--model\.mask_ratio`.*2 x 2.* is 4"):
            random_block_mask(3, size, block, ratio)
        return
    mask = random_block_mask(50, size, block, ratio)
    assert mask.dtype == torch.bool
    assert mask.shape == (50, *shape)
    assert mask.sum(dim=(1, 2)).tolist() == [masked] * 50


def test_all_choices_are_equally_likely_and_independent() -> None:
    """Two of four blocks: six choices; the images of a batch do not follow each other."""
    draws = 6000
    mask = random_block_mask(draws, (4, 4), 2, 0.5).flatten(1)
    choices = (mask * torch.tensor([1, 2, 4, 8])).sum(1)
    counts = choices.bincount(minlength=16)
    expected = [sum(1 << i for i in pair) for pair in itertools.combinations(range(4), 2)]
    assert counts.nonzero().flatten().tolist() == sorted(expected)
    chi_squared = float(((counts[expected] - draws / 6) ** 2 / (draws / 6)).sum())
    assert chi_squared < 20.5  # 5 degrees of freedom, p = 0.001
    assert float((choices[1:] == choices[:-1]).float().mean()) == pytest.approx(1 / 6, abs=0.02)


def test_the_seed_decides() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return random_block_mask(8, (32, 32), 4, 0.6)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("block", [0, -1, 17])
def test_blocks_that_do_not_fit(block: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"`--model\.block_size` to be from 1 to the 16 pixels.* got {block}"):
        random_block_mask(2, (16, 20), block, 0.5)


def test_every_pixel_has_its_block() -> None:
    blocks = random_block_mask(4, (10, 7), 3, 0.5)
    mask = mask_of_pixels(blocks, (10, 7), 3)
    assert mask.shape == (4, 1, 10, 7)
    for image, row, column in itertools.product(range(4), range(10), range(7)):
        assert mask[image, 0, row, column] == blocks[image, row // 3, column // 3]


def example() -> tuple[Tensor, Tensor, Tensor]:
    mask = mask_of_pixels(random_block_mask(3, (5, 7), 2, 0.4), (5, 7), 2)  # unequal numbers of pixels
    return torch.randn(3, 2, 5, 7, dtype=torch.float64), torch.randn(3, 2, 5, 7, dtype=torch.float64), mask


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_value_against_a_loop(norm: str) -> None:
    prediction, target, mask = example()
    errors = []
    for image, channel, row, column in itertools.product(range(3), range(2), range(5), range(7)):
        if mask[image, 0, row, column]:
            error = abs(float(prediction[image, channel, row, column]) - float(target[image, channel, row, column]))
            errors.append(error if norm == "l1" else error**2)
    found = masked_reconstruction_loss(prediction, target, mask, norm)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(sum(errors) / len(errors), rel=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradient_of_masked_pixels_alone(norm: str) -> None:
    prediction, target, mask = example()
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: masked_reconstruction_loss(p, target, mask, norm), prediction)  # type: ignore[arg-type]
    value = masked_reconstruction_loss(prediction, target, mask, norm)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(value, prediction)
    everywhere = mask.expand_as(prediction)
    assert (gradient[~everywhere] == 0).all()
    assert (gradient[everywhere] != 0).all()


def test_what_is_not_masked_may_be_anything() -> None:
    prediction, target, mask = example()
    expected = masked_reconstruction_loss(prediction, target, mask)
    broken = prediction.masked_fill(~mask, torch.inf)
    assert torch.equal(masked_reconstruction_loss(broken, target, mask), expected)
    assert float(masked_reconstruction_loss(prediction, target, torch.zeros_like(mask))) == 0


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_float32_of_half_precision(norm: str, autocast: bool) -> None:
    prediction, target, mask = example()
    half, half_target = (100 * prediction).bfloat16(), target.bfloat16()
    expected = masked_reconstruction_loss(half.float(), half_target.float(), mask, norm)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = masked_reconstruction_loss(half, half_target, mask, norm)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_examples() -> None:
    assert doctest.testmod(framework.functional.masking, extraglobs={"torch": torch}) == (0, 5)
