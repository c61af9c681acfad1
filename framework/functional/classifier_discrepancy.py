"""How two classifiers' predictions differ, and how unevenly one spreads over the classes."""

from __future__ import annotations

import math

from torch import Tensor

from framework.functional.precision import full_precision


@full_precision
def classifier_discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """The mean of ``|p - q|`` over images and classes (Saito et al. 2018, eq. 2).

    Args:
        first: logits ``[N, K]`` of a classifier.
        second: logits ``[N, K]`` of the other one.

    Returns:
        0-d tensor, from 0 to ``2 / K``.

    >>> classifier_discrepancy(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]]))
    tensor(1.)
    """
    return (first.softmax(dim=1) - second.softmax(dim=1)).abs().mean()


@full_precision
def class_balance(logits: Tensor) -> Tensor:
    """``-mean over the classes of log(mean over the images of p)``: log K where all classes get the same share.

    The term that the published code of MCD adds where the target's classes tend to collapse. From logarithms of the
    probabilities: no constant has to keep a class that nobody predicts from the logarithm of 0.

    Args:
        logits: shape ``[N, K]``.

    Returns:
        0-d tensor, at least ``log K``.

    >>> class_balance(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))
    tensor(0.6931)
    """
    return math.log(len(logits)) - logits.log_softmax(dim=1).logsumexp(dim=0).mean()
