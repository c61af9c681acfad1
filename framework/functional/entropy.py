"""Entropy of predictions: of each image's, and of their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.functional.precision import full_precision


@full_precision
def prediction_entropy(logits: Tensor) -> Tensor:
    """Entropy, in nats, of each row's softmax: ``-sum over k of p_k log p_k``.

    From the log-softmax: a probability that rounds to 0 adds 0, and its gradient stays finite.

    Args:
        logits: shape ``[N, K]``.

    Returns:
        Shape ``[N]``, between 0 (one class is certain) and ``log K``.

    >>> prediction_entropy(torch.tensor([[0.0, 0.0], [1000.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    log_probabilities = logits.log_softmax(dim=1)
    return (-log_probabilities.exp() * log_probabilities).sum(dim=1)


@full_precision
def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy, in nats, of the mean of all rows' softmax: ``log K`` where all classes are predicted alike often.

    Args:
        logits: shape ``[..., N, K]``, one batch or several.

    Returns:
        Shape ``[...]``, between 0 (all rows name one class) and ``log K``; 0-d for one batch.

    >>> marginal_entropy(torch.tensor([[0.0, 1000.0], [1000.0, 0.0]]))
    tensor(0.6931)
    """
    marginal = logits.softmax(dim=-1).mean(dim=-2)
    # a class that has rounded to 0 adds 0, and its gradient stays finite
    return -(marginal * marginal.clamp(min=torch.finfo(marginal.dtype).tiny).log()).sum(dim=-1)
