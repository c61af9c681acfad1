"""The mean of several predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.functional.precision import full_precision


@full_precision
def mixture_log_probabilities(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Logarithm of the weighted mean of several predictions' probabilities.

    ``log sum over m of w_m softmax(logits_m)``, by log-sum-exp: finite where every probability is too small for a
    float. These are logits too, whose softmax is the mean.

    Args:
        logits: of ``M`` predictions, shape ``[M, N, K]``.
        weights: shape ``[M]``, 0 or more, not all 0; they are divided by their sum. Default: all alike.

    Returns:
        Shape ``[N, K]``.

    >>> mixture_log_probabilities(torch.tensor([[[0.0, 0.0]], [[1000.0, 0.0]]])).exp()
    tensor([[0.7500, 0.2500]])
    """
    if weights is None:
        weights = logits.new_ones(len(logits))
    weights = weights.to(logits.dtype)
    shares = (weights / weights.sum()).log()
    return torch.logsumexp(logits.log_softmax(dim=2) + shares[:, None, None], dim=0)
