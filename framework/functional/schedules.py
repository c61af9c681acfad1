"""Schedules as functions of time: the reversal coefficient, and factors of the learning rate for ``LambdaLR``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from framework.errors import ConfigurationError


def reversal_coefficient(progress: Tensor, gamma: float = 10.0, maximum: float = 1.0) -> Tensor:
    """The coefficient of gradient reversal: ``maximum * (2 / (1 + exp(-gamma * p)) - 1)`` (Ganin et al. 2016).

    Section 5.2.2 there. Rises from 0, while the discriminator still knows nothing, to ``maximum``.

    Args:
        progress: share of the training that is done, a 0-d tensor; clamped to [0, 1].
        gamma: how fast it rises; 10 in the paper. Codes that count 1,000 iterations as progress 1 and do not stop
            there have the same curve with ``gamma = iterations / 1000``.
        maximum: the value it rises to, reached but for ``2 / (1 + exp(gamma))``.

    >>> reversal_coefficient(torch.tensor([0.0, 0.1, 1.0]))
    tensor([0.0000, 0.4621, 0.9999])
    """
    # tanh(x / 2) = 2 / (1 + exp(-x)) - 1, without the cancellation near 0
    rise = torch.tanh(0.5 * gamma * progress.clamp(0.0, 1.0))
    return rise if maximum == 1.0 else maximum * rise


def inverse_decay(iteration: int, gamma: float, beta: float) -> float:
    """``(1 + gamma * iteration) ** -beta``: the annealing of Ganin et al. 2016, sec. 5.2.2, and of DAN, CDAN and TLlib.

    The paper writes it with progress p and ``gamma = 10``, ``beta = 0.75``; by iterations ``gamma`` is 10 over their
    planned number, and the published codes use 3e-4 to 1e-3.

    Raises:
        ConfigurationError: a negative argument.

    >>> round(inverse_decay(10_000, gamma=1e-3, beta=0.75), 4)
    0.1656
    """
    _check_at_least("iteration", iteration, 0)
    _check_at_least("gamma", gamma, 0.0)
    _check_at_least("beta", beta, 0.0)
    return math.pow(1.0 + gamma * iteration, -beta)


def cosine_with_warmup(iteration: int, total: int, warmup: int, minimum: float = 0.0) -> float:
    """Linear rise over ``warmup`` iterations, then half a cosine down to ``minimum`` (Loshchilov & Hutter 2017, eq. 5).

    The rise is ``(iteration + 1) / (warmup + 1)``: the first step already learns, and iteration ``warmup`` is the
    first with the full rate. ``minimum`` is reached at iteration ``total``, one past the last step, so no step of the
    plan is spent at a rate of 0; later iterations stay there.

    Args:
        iteration: steps taken so far.
        total: planned steps, warm-up included.
        warmup: steps of the linear rise, fewer than ``total``; 0 for none.
        minimum: the last factor, in [0, 1].

    Raises:
        ConfigurationError: an argument outside its range.

    >>> [round(cosine_with_warmup(i, total=6, warmup=2), 2) for i in range(7)]
    [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    _check_at_least("iteration", iteration, 0)
    _check_at_least("total", total, 1)
    if not 0 <= warmup < total:
        raise ConfigurationError(
            f"Expected `warmup` to be at least 0 and less than `total` = {total}, but got {warmup}."
        )
    if not 0.0 <= minimum <= 1.0:
        raise ConfigurationError(f"Expected `minimum` to be in [0, 1], but got {minimum}.")
    if iteration < warmup:
        return (iteration + 1) / (warmup + 1)
    descended = min((iteration - warmup) / (total - warmup), 1.0)
    return minimum + (1.0 - minimum) * 0.5 * (1.0 + math.cos(math.pi * descended))


def step_decay(iteration: int, milestones: Sequence[int], factor: float) -> float:
    """``factor`` to the number of milestones reached: He et al. 2015 divide by 10 at 32k and 48k of 64k iterations.

    Raises:
        ConfigurationError: a negative iteration, milestones that do not increase, a factor that is not positive.

    >>> [round(step_decay(i, milestones=[32_000, 48_000], factor=0.1), 2) for i in (31_999, 32_000, 48_000)]
    [1.0, 0.1, 0.01]
    """
    _check_at_least("iteration", iteration, 0)
    if any(later <= earlier for earlier, later in pairwise(milestones)):
        raise ConfigurationError(f"Expected `milestones` to increase, but got {list(milestones)}.")
    if not (factor > 0.0 and math.isfinite(factor)):
        raise ConfigurationError(f"Expected `factor` to be positive, but got {factor}.")
    return math.pow(factor, sum(iteration >= milestone for milestone in milestones))


def _check_at_least(name: str, value: float, least: float) -> None:
    if not (value >= least and math.isfinite(value)):
        raise ConfigurationError(f"Expected `{name}` to be at least {least:g}, but got {value}.")
