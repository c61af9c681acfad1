"""Quarter turns: every one against arrays written by hand, and what they do not accept."""

from __future__ import annotations

import pytest
import torch

from framework.errors import ConfigurationError
from framework.functional import quarter_turns


def test_every_turn_by_hand() -> None:
    first = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    second = [[10, 11, 12], [13, 14, 15], [16, 17, 18]]
    turned = quarter_turns(torch.tensor([[first], [second]]))
    assert turned.shape == (4, 2, 1, 3, 3)
    expected = [
        [first, second],
        [[[3, 6, 9], [2, 5, 8], [1, 4, 7]], [[12, 15, 18], [11, 14, 17], [10, 13, 16]]],
        [[[9, 8, 7], [6, 5, 4], [3, 2, 1]], [[18, 17, 16], [15, 14, 13], [12, 11, 10]]],
        [[[7, 4, 1], [8, 5, 2], [9, 6, 3]], [[16, 13, 10], [17, 14, 11], [18, 15, 12]]],
    ]
    assert turned[:, :, 0].tolist() == expected


def test_four_turns_are_none() -> None:
    images = torch.randn(2, 3, 5, 5)
    turned = images
    for turns in range(1, 5):
        turned = quarter_turns(turned)[1]
        assert torch.equal(turned, quarter_turns(images)[turns % 4])
    assert torch.equal(turned, images)


def test_channels_and_images_stay_in_order() -> None:
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    turned = quarter_turns(images)
    assert turned.dtype == images.dtype
    for n in range(4):
        for channel in range(3):
            alone = quarter_turns(images[n : n + 1, channel : channel + 1])
            assert torch.equal(turned[:, n, channel], alone[:, 0, 0])


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"square images \[N, C, S, S\], but got \["):
        quarter_turns(torch.zeros(shape))
