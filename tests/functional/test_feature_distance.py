"""Distances of feature maps, channel by channel, against a loop."""

from __future__ import annotations

import pytest
import torch

from framework.functional import channel_distances


@pytest.mark.parametrize(
    ("shape", "channels"), [((3, 4, 2, 5), 1), ((3, 2, 5, 4), 3), ((3, 6, 4), 2), ((3, 4), 1), ((3, 2, 4), -1)]
)
def test_against_a_loop(shape: tuple[int, ...], channels: int) -> None:
    maps, source = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
    expected = []
    for c in range(4):
        differences = (maps.detach().select(channels, c) - source.select(channels, c)).flatten().tolist()
        expected.append(sum(d**2 for d in differences) / len(differences))
    distances = channel_distances(maps, source, channels)
    assert distances.tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: channel_distances(x, source, channels), maps)


def test_float32_under_autocast() -> None:
    maps, source = torch.full((2, 3, 4, 4), 300.0).half(), torch.zeros(2, 3, 4, 4).half()
    with torch.autocast("cpu", torch.bfloat16):
        distances = channel_distances(maps, source)
    assert distances.dtype == torch.float32
    assert distances.tolist() == [90_000.0] * 3  # beyond float16
