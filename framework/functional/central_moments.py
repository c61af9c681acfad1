"""The distance of two samples by their mean and central moments."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.kernels import check_features
from framework.functional.precision import full_precision


@full_precision
def central_moment_discrepancies(source: Tensor, target: Tensor, moments: int = 5, length: float = 1.0) -> Tensor:
    """The terms of the central moment discrepancy (Zellinger et al. 2017, sec. 3), whose sum it is.

    The first is ``|E x - E y|_2 / length``, the k-th ``|c_k(x) - c_k(y)|_2 / length^k`` with the central moments
    ``c_k(x) = E (x - E x)^k`` of each feature by itself. Every term of activations in an interval of this length is at
    most ``sqrt(D)``.

    The norms are not squared, so their gradients do not fade as the domains get close; where two moments are equal,
    the gradient of that term is 0.

    Args:
        source: shape ``[N, D]``, in an interval of the given length.
        target: shape ``[M, D]``, in the same interval; ``M`` may differ from ``N``.
        moments: ``K``, how many terms.
        length: of the interval, ``b - a``.

    Returns:
        Shape ``[K]``.

    Raises:
        ConfigurationError: shapes that do not fit, no moments, or a length that is not positive.

    >>> central_moment_discrepancies(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.25], [0.25]]), moments=2)
    tensor([0.2500, 0.2500])
    """
    check_features(source, target)
    if moments < 1:
        raise ConfigurationError(f"Expected `moments` to be at least 1, but got {moments}.")
    if not length > 0.0:
        raise ConfigurationError(f"Expected `length` to be above 0, but got {length}.")
    source, target = source / length, target / length
    source_mean, target_mean = source.mean(0), target.mean(0)
    differences = [source_mean - target_mean]
    source, target = source - source_mean, target - target_mean
    source_power, target_power = source, target
    for _ in range(2, moments + 1):
        source_power, target_power = source_power * source, target_power * target
        differences.append(source_power.mean(0) - target_power.mean(0))
    # a gradient of 0, not NaN, where a norm is 0
    terms: Tensor = torch.linalg.vector_norm(torch.stack(differences), dim=1)
    return terms
