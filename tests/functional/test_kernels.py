from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import FIVE_SCALES, gaussian_kernel_sum, mean_squared_distance, squared_distances


def samples(count: int, features: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loop_distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.tensor(
        [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in y.tolist()] for p in x.tolist()]
    )


def test_squared_distances_against_a_loop() -> None:
    x, y = samples(5), samples(7, seed=1)
    found = squared_distances(x, y)
    assert found.shape == (5, 7)
    torch.testing.assert_close(found.float(), loop_distances(x, y), rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [0.0, 300.0, -3e4])
def test_common_offset_in_float32(offset: float) -> None:
    # the same rounded features in both precisions: only the arithmetic is compared
    x, y = samples(20, 256, dtype=torch.float32) + offset, samples(30, 256, seed=1, dtype=torch.float32) + offset
    exact = (x.double()[:, None] - y.double()).square().sum(-1)
    torch.testing.assert_close(squared_distances(x, y).double(), exact, rtol=1e-5, atol=0)
    assert mean_squared_distance(x, y).item() == pytest.approx(
        torch.cat([x, y]).double().var(dim=0, correction=0).sum().item() * 2, rel=1e-5
    )


def test_never_negative_and_symmetric() -> None:
    x = samples(40, 64, dtype=torch.float32) * 50
    near = x + 1e-6
    assert squared_distances(x, near).min() >= 0
    assert squared_distances(x, x).diagonal().max() < 1e-1  # 1e-7 of the squared norm
    torch.testing.assert_close(squared_distances(x, near), squared_distances(near, x).T, rtol=1e-5, atol=1e-1)


def test_equal_rows_have_distance_0_exactly() -> None:
    row = torch.tensor([[0.1, 300.3, -7e5]])
    assert squared_distances(row.repeat(3, 1), row.repeat(7, 1)).abs().max() == 0
    assert mean_squared_distance(row.repeat(3, 1), row.repeat(7, 1)) == 0


def test_distance_gradients() -> None:
    x, y = samples(4, 3).requires_grad_(), samples(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(squared_distances, (x, y))
    assert torch.autograd.gradcheck(lambda z: squared_distances(z, z), (x,))


def test_gradient_of_near_duplicates_is_not_cut_off() -> None:
    # rounding makes some of these distances negative before the correction
    x = samples(64, 128, dtype=torch.float32)
    y = x + 2e-5 * samples(64, 128, seed=1, dtype=torch.float32)
    centred = x - torch.cat([x, y]).mean(0)
    gram = centred.square().sum(1) + (y - x + centred).square().sum(1) - 2 * (centred * (y - x + centred)).sum(1)
    assert (gram <= 0).any()
    x.requires_grad_()
    (found,) = torch.autograd.grad(squared_distances(x, y).diagonal().sum(), x)
    expected = 2 * (x.detach() - y)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=2e-6)
    assert (found.norm(dim=1) > 0.5 * expected.norm(dim=1)).all()


def test_mean_squared_distance_is_the_mean_of_all_pairs() -> None:
    source, target = samples(5), samples(9, seed=1) + 1
    joint = torch.cat([source, target]).requires_grad_()
    expected = loop_distances(joint.detach(), joint.detach()).mean()
    found = mean_squared_distance(joint[:5], joint[5:])
    torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)
    assert not found.requires_grad


SCALES = [
    FIVE_SCALES,
    (1.0,),
    (2.0, 0.5, 1.0),  # powers of two in another order
    (0.3, 0.6, 1.2),  # consecutive, though not powers of two themselves
    (0.25, 1.0, 4.0),
    (1.0, 1.0),
    (0.7, 1.3, 2.0),
]


@pytest.mark.parametrize("scales", SCALES)
def test_kernel_sum_against_a_loop(scales: tuple[float, ...]) -> None:
    distances = samples(4, 5).square() * 10
    expected = torch.tensor(
        [[sum(math.exp(-d / (2 * scale * 3.0)) for scale in scales) for d in row] for row in distances.tolist()],
        dtype=torch.float64,
    )
    bandwidth = torch.tensor(3.0, dtype=torch.float64)
    torch.testing.assert_close(gaussian_kernel_sum(distances, scales, bandwidth), expected, rtol=1e-13, atol=0)
    # squaring four times in float32
    found = gaussian_kernel_sum(distances.float(), scales, bandwidth.float())
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("scales", SCALES)
def test_kernel_sum_gradients(scales: tuple[float, ...]) -> None:
    distances = samples(3, 4).square().requires_grad_()
    bandwidth = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, b: gaussian_kernel_sum(d, scales, b), (distances, bandwidth))


def test_one_exponential_for_consecutive_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: calls.append(1) or exp(x))
    gaussian_kernel_sum(torch.ones(2), FIVE_SCALES, torch.tensor(1.0))
    assert len(calls) == 1


def test_half_precision_and_autocast() -> None:
    x = samples(6, 8, dtype=torch.float32).to(torch.bfloat16)
    expected = squared_distances(x.float(), x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(squared_distances(x, x), expected)
        assert mean_squared_distance(x, x).dtype == torch.float32


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,), (math.nan,), (math.inf,)])
def test_scales_must_be_positive(scales: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="Expected `scales` to be positive numbers, but got"):
        gaussian_kernel_sum(torch.ones(2), scales, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((3,), (3, 2), r"Expected `x` to have shape \[samples, features\] with at least 1 samples, but got \[3\]"),
        ((3, 2), (0, 2), r"Expected `y` to have shape .* but got \[0, 2\]"),
        ((3, 2), (3, 4), "Expected `x` and `y` to have the same number of features, but got 2 and 4"),
    ],
)
def test_shape_errors(x: tuple[int, ...], y: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        squared_distances(torch.zeros(x), torch.zeros(y))
