"""Contrast of a query with keys of all classes: those of its own class attract, the others repel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.functional.precision import full_precision, full_precision_matmul


@full_precision
def unit_length(vectors: Tensor) -> Tensor:
    """Vectors ``[N, D]`` divided by their lengths, in float32 under autocast."""
    return F.normalize(vectors, dim=1)


@full_precision
def queue_contrast(
    queries: Tensor, partners: Tensor, queue: Tensor, filled: Tensor, labels: Tensor, temperature: float = 0.07
) -> Tensor:
    """Mean negative log-probability of the keys of a query's own class, among all keys (Zhong et al. 2020).

    The keys of query ``i`` are its partner and all keys in the queue; those of its class are the positive ones,
    ``P_i``, its partner included. With ``s`` the cosine of query and key over the temperature,

        ``- mean over i of mean over k in P_i of (s_ik - log sum over all keys j of exp s_ij)``

    which is, but for the entropy of the positive keys' uniform distribution, its divergence from the softmax.

    Args:
        queries: shape ``[N, D]``.
        partners: a key of each query's own, shape ``[N, D]``.
        queue: keys of length 1, by class, shape ``[K, L, D]``.
        filled: how many of each class's places hold a key, from the first on, shape ``[K]``; the others take no part.
        labels: class indices of the queries, shape ``[N]``.
        temperature: of the softmax.

    Returns:
        0-d tensor; 0 where the queue is empty.

    >>> queue = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> query = torch.tensor([[2.0, 0.0]])  # its partner and the first class's key are at cosine 1, the other at 0
    >>> queue_contrast(query, query, queue, torch.tensor([1, 1]), torch.tensor([0]), temperature=1.0)
    tensor(0.8620)
    """
    queries, partners = unit_length(queries), unit_length(partners)
    classes, places, _ = queue.shape
    similarities = full_precision_matmul(queries, queue.flatten(0, 1).T) / temperature  # [N, K L]
    there = (torch.arange(places, device=queue.device) < filled[:, None]).flatten()  # [K L]
    own_class = torch.arange(classes * places, device=queue.device) // places == labels[:, None]  # [N, K L]
    with_partner = torch.cat(
        [(queries * partners).sum(dim=1, keepdim=True) / temperature, similarities.masked_fill(~there, -torch.inf)],
        dim=1,
    )
    positive = F.pad(own_class & there, (1, 0), value=True)
    log_probabilities = with_partner.log_softmax(dim=1).masked_fill(~positive, 0.0)
    return -(log_probabilities.sum(dim=1) / positive.sum(dim=1)).mean()
