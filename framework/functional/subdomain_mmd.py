"""The squared maximum mean discrepancy of each class, averaged: subdomains instead of domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.kernels import (
    FIVE_SCALES,
    check_features,
    gaussian_kernel_sum,
    mean_squared_distance,
    squared_distances,
)
from framework.functional.precision import full_precision, full_precision_matmul

CountedClasses = Literal["all", "shared"]


@full_precision
def local_mmd(
    source: Tensor,
    target: Tensor,
    source_labels: Tensor,
    target_probabilities: Tensor,
    classes: CountedClasses = "all",
    scales: Sequence[float] = FIVE_SCALES,
    bandwidth: Tensor | None = None,
) -> Tensor:
    """The local maximum mean discrepancy (Zhu et al. 2020).

    It is the mean over the classes of ``|sum_i w_i phi(source_i) - sum_j v_j phi(target_j)|^2``. Of each class the
    weights sum to 1: a source image weighs by its label, a target image by its probability of the class. The weights
    have no gradient, as in the published codes: the features are moved, not the predictions.

    A class without a source image in the batch has no discrepancy to speak of: its term is 0.

    Args:
        source: shape ``[N, D]``.
        target: shape ``[M, D]``; ``M`` may differ from ``N``.
        source_labels: class indices ``[N]``.
        target_probabilities: shape ``[M, K]``, rows that sum to 1.
        classes: ``all`` divides the sum of the terms by ``K`` (the paper); ``shared`` takes the mean over the classes
            that a source image has and that some target image most probably has (the published codes). 0 if none.
        scales: factors of the bandwidth, one Gaussian kernel each.
        bandwidth: in the unit of a squared distance; default: the joint sample's mean squared distance, detached.

    Returns:
        0-d tensor, at least 0 but for rounding.

    Raises:
        ConfigurationError: shapes that do not fit, an unknown ``classes``, or scales that are not positive.

    >>> source, target = torch.tensor([[0.0], [5.0]]), torch.tensor([[2.0], [5.0]])
    >>> labels, probabilities = torch.tensor([0, 1]), torch.eye(2)
    >>> local_mmd(source, target, labels, probabilities, scales=(1.0,), bandwidth=torch.tensor(2.0))  # 1 - exp(-1)
    tensor(0.6321)
    """
    check_features(source, target)
    if source_labels.shape != source.shape[:1]:
        raise ConfigurationError(
            f"Expected `source_labels` to have shape {[len(source)]}, but got {list(source_labels.shape)}."
        )
    if target_probabilities.ndim != 2 or len(target_probabilities) != len(target):
        raise ConfigurationError(
            f"Expected `target_probabilities` to have shape [{len(target)}, classes], but got "
            f"{list(target_probabilities.shape)}."
        )
    if classes not in ("all", "shared"):
        raise ConfigurationError(f"Expected `classes` to be 'all' or 'shared', but got {classes!r}.")
    of_source, of_target = class_weights(source_labels, target_probabilities.to(source.dtype), classes)
    common = mean_squared_distance(source, target) if bandwidth is None else bandwidth

    def weighted_sum(x: Tensor, y: Tensor, x_weights: Tensor, y_weights: Tensor) -> Tensor:
        weights = full_precision_matmul(x_weights, y_weights.T)  # summed over the classes
        return (weights * gaussian_kernel_sum(squared_distances(x, y), scales, common)).sum()

    return (
        weighted_sum(source, source, of_source, of_source)
        + weighted_sum(target, target, of_target, of_target)
        - 2.0 * weighted_sum(source, target, of_source, of_target)
    )


def class_weights(
    source_labels: Tensor, target_probabilities: Tensor, classes: CountedClasses
) -> tuple[Tensor, Tensor]:
    """Weights ``[N, K]`` and ``[M, K]`` of the images in each class's term, times the root of that term's share."""
    labels, probabilities = one_hot(source_labels, target_probabilities), target_probabilities.detach()
    counts, masses = labels.sum(0), probabilities.sum(0)
    least = torch.finfo(masses.dtype).tiny  # what can be divided by
    counted = ((counts > 0) & (masses >= least)).to(masses.dtype)
    if classes == "shared":
        counted = counted * one_hot(probabilities.argmax(1), probabilities).amax(0)
        share = counted / counted.sum().clamp(min=1.0)
    else:
        share = counted / len(counted)
    # first the quotient, which is at most 1, then the share: of a class that is not counted both are finite
    return labels / counts.clamp(min=1.0) * share.sqrt(), probabilities / masses.clamp(min=least) * share.sqrt()


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Rows of 0 and 1, of the width and type of ``like``; without a look at the labels, which waits for the device."""
    return (labels[:, None] == torch.arange(like.shape[1], device=like.device)).to(like.dtype)
