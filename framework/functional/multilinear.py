"""Multilinear maps of features and predictions, by which CDAN conditions its discriminator.

Long et al., "Conditional Adversarial Domain Adaptation", NeurIPS 2018, section 3.2.
"""

from __future__ import annotations

import math

from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.precision import full_precision, full_precision_matmul


@full_precision
def multilinear_map(features: Tensor, probabilities: Tensor) -> Tensor:
    """The outer product of each image's features and predictions (Long 2018, section 3.2).

    Args:
        features: shape ``[N, D]``.
        probabilities: shape ``[N, K]``.

    Returns:
        Shape ``[N, D * K]``; entry ``d * K + k`` is ``features[n, d] * probabilities[n, k]``.

    >>> multilinear_map(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.75]]))
    tensor([[0.2500, 0.7500, 0.5000, 1.5000]])
    """
    _same_length(features, probabilities)
    return (features.unsqueeze(2) * probabilities.unsqueeze(1)).flatten(1)


@full_precision
def randomized_multilinear_map(
    features: Tensor, probabilities: Tensor, feature_map: Tensor, probability_map: Tensor
) -> Tensor:
    """``(f R_f) * (p R_p) / sqrt(d)``: the outer product in expectation, but of width ``d`` (Long 2018, section 3.2).

    Over matrices of independent entries with mean 0 and variance 1, the inner product of two images' results is that of
    their outer products on average (theorem 1 there).

    Args:
        features: shape ``[N, D]``.
        probabilities: shape ``[N, K]``.
        feature_map: shape ``[D, d]``.
        probability_map: shape ``[K, d]``.

    Returns:
        Shape ``[N, d]``.

    >>> ones = torch.ones(2, 4)
    >>> randomized_multilinear_map(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 0.75]]), ones, ones)
    tensor([[1.5000, 1.5000, 1.5000, 1.5000]])
    """
    _same_length(features, probabilities)
    product = full_precision_matmul(features, feature_map) * full_precision_matmul(probabilities, probability_map)
    return product / math.sqrt(feature_map.shape[1])


def _same_length(features: Tensor, probabilities: Tensor) -> None:
    if features.ndim != 2 or probabilities.ndim != 2 or len(features) != len(probabilities):
        raise ConfigurationError(
            "Expected `features` [N, D] and `probabilities` [N, K] of the same images, but got "
            f"{list(features.shape)} and {list(probabilities.shape)}."
        )
