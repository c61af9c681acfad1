from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from framework.errors import ConfigurationError
from framework.functional import cosine_with_warmup, inverse_decay, reversal_coefficient, step_decay


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.0), (0.1, 0.46212), (0.5, 0.98661), (1.0, 0.99991)])
def test_reversal_coefficient_of_the_paper(progress: float, expected: float) -> None:
    found = reversal_coefficient(torch.tensor(progress))
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("maximum", [0.1, 1.0, 2.0])
def test_reversal_coefficient_formula(gamma: float, maximum: float) -> None:
    for step in range(11):
        p = step / 10
        expected = maximum * (2.0 / (1.0 + math.exp(-gamma * p)) - 1.0)
        found = reversal_coefficient(torch.tensor(p, dtype=torch.float64), gamma, maximum)
        assert found.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("iterations", "expected"), [(100, 0.05), (1_000, 0.46), (3_000, 0.91), (5_000, 0.99), (10_000, 1.0)]
)
def test_reversal_coefficient_of_tllib(iterations: int, expected: float) -> None:
    # METHODS 1.0: TLlib counts 1,000 iterations as progress 1 with gamma 1, and does not stop there
    found = reversal_coefficient(torch.tensor(1.0), gamma=iterations / 1_000)
    assert round(found.item(), 2) == expected


def test_reversal_coefficient_clamps_progress() -> None:
    below, above = reversal_coefficient(torch.tensor(-0.5)), reversal_coefficient(torch.tensor(1.5))
    assert below.item() == 0.0
    assert torch.equal(above, reversal_coefficient(torch.tensor(1.0)))


def test_inverse_decay() -> None:
    assert inverse_decay(0, 1e-3, 0.75) == 1.0
    assert inverse_decay(1_000, 1e-3, 1.0) == pytest.approx(0.5)
    assert inverse_decay(15_000, 1e-3, 0.75) == pytest.approx(0.125)  # 16 ** -0.75
    assert inverse_decay(15_000, 0.0, 0.75) == 1.0


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("minimum", [0.0, 0.1, 1.0])
def test_cosine_with_warmup(warmup: int, minimum: float) -> None:
    total = 50
    factors = [cosine_with_warmup(i, total, warmup, minimum) for i in range(total + 1)]
    assert factors[0] == pytest.approx(1 / (warmup + 1))
    assert factors[warmup] == 1.0
    assert all(0.0 < factor <= 1.0 for factor in factors[:-1])
    assert factors[-1] == pytest.approx(minimum)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert cosine_with_warmup((total + warmup) // 2, total, warmup, minimum) == pytest.approx(
        minimum + (1 - minimum) / 2 * (1 + math.cos(math.pi * ((total + warmup) // 2 - warmup) / (total - warmup)))
    )
    assert cosine_with_warmup(total + 5, total, warmup, minimum) == factors[-1]


def test_step_decay() -> None:
    factors = [step_decay(i, [3, 5], 0.1) for i in range(7)]
    assert factors == pytest.approx([1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    assert step_decay(10, [], 0.1) == 1.0


def test_step_decay_is_multi_step_lr() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    for i in range(6):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(step_decay(i, [2, 4], 0.5))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inverse_decay(-1, 1e-3, 0.75), "Expected `iteration` to be at least 0, but got -1"),
        (lambda: inverse_decay(1, -1e-3, 0.75), "Expected `gamma` to be at least 0, but got -0.001"),
        (lambda: inverse_decay(1, 1e-3, math.nan), "Expected `beta` to be at least 0, but got nan"),
        (lambda: cosine_with_warmup(-1, 10, 2), "Expected `iteration`"),
        (lambda: cosine_with_warmup(0, 0, 0), "Expected `total` to be at least 1, but got 0"),
        (lambda: cosine_with_warmup(0, 10, 10), "Expected `warmup` to be at least 0 and less than `total` = 10, but"),
        (lambda: cosine_with_warmup(0, 10, -1), "Expected `warmup`"),
        (lambda: cosine_with_warmup(0, 10, 2, 1.5), r"Expected `minimum` to be in \[0, 1\], but got 1.5"),
        (lambda: step_decay(-1, [1], 0.1), "Expected `iteration`"),
        (lambda: step_decay(0, [3, 3], 0.1), r"Expected `milestones` to increase, but got \[3, 3\]"),
        (lambda: step_decay(0, [3], 0.0), "Expected `factor` to be positive, but got 0.0"),
    ],
)
def test_errors(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()
