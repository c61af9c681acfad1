"""How well features tell classes apart: nearest neighbours and a linear classifier on top of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.functional.contrast import unit_length
from framework.functional.precision import full_precision
from framework.functional.task_relationship import logistic_regression

BLOCK = 1 << 24  # numbers in memory at once: 64 MiB in float32


@full_precision
def nearest_neighbour_scores(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Weighted vote of the nearest neighbours by cosine similarity (Wu et al., CVPR 2018, arXiv:1805.01978).

    A neighbour with the cosine ``s`` votes for its class with the weight ``exp(s / temperature)``. The paper takes 200
    neighbours, of 1.28 million images; folders of a few thousand need fewer. The votes of an image are divided by
    their sum, which changes no decision and keeps them finite at any temperature.

    Args:
        features: of the images to classify, shape ``[M, C]``.
        bank: features of labelled images, shape ``[N, C]``.
        bank_labels: class indices, shape ``[N]``.
        num_classes: number of classes ``K``.
        neighbours: how many vote; the whole bank where it holds fewer.
        temperature: the lower, the more the nearest ones count.

    Returns:
        Shape ``[M, K]``, rows sum to 1. Blocks of images are compared with the bank, so that memory stays bounded.

    >>> bank, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1, 1])
    >>> nearest_neighbour_scores(torch.tensor([[3.0, 0.0]]), bank, labels, 2, neighbours=2, temperature=1.0)
    tensor([[0.5727, 0.4273]])
    """
    features, bank = unit_length(features), unit_length(bank)
    neighbours = min(neighbours, len(bank))
    votes_for = F.one_hot(bank_labels, num_classes).to(features.dtype)
    rows = max(1, BLOCK // max(len(bank), neighbours * num_classes))
    scores = []
    for block in torch.split(features, rows):
        cosines, nearest = (block @ bank.T).topk(neighbours, dim=1)
        weights = (cosines / temperature).softmax(dim=1)
        scores.append((weights[:, None] @ votes_for[nearest])[:, 0])  # a scatter's order is not fixed on a GPU
    return torch.cat(scores)


@full_precision
def linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, weight_decay: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """A linear classifier of features: the multinomial logistic regression of standardised ones, to its optimum.

    It minimises the mean cross-entropy plus ``weight_decay / 2 |W|^2``, with ``W`` the weights of features of mean 0
    and standard deviation 1; the bias is not regularised. Found by L-BFGS from zeros in float64, so without a learning
    rate and without chance, and in any context: no gradient reaches the features.

    Args:
        features: shape ``[N, C]``.
        labels: class indices, shape ``[N]``.
        num_classes: number of classes ``K``.
        weight_decay: ``1 / (N C')`` with ``C'`` scikit-learn's ``C``.

    Returns:
        Weight ``[K, C]`` and bias ``[K]``, float64, for the features as they are: the logits are
        ``features @ weight.T + bias``.
    """
    with torch.inference_mode(False):  # validation runs in that mode, in which nothing can be minimised
        inputs, labels = features.detach().double().clone(), labels.clone()
        mean, deviation = inputs.mean(dim=0), inputs.std(dim=0, correction=0)
        deviation = torch.where(deviation > 1e-6 * mean.abs(), deviation, 1.0)  # constant but for rounding
        standardised = F.pad((inputs - mean) / deviation, (0, 1), value=1.0)
        strength = 1 / (weight_decay * len(labels))
        solution = logistic_regression(standardised, labels, num_classes, strength, intercept=True)
        weight = solution[:, :-1] / deviation
        return weight, solution[:, -1] - weight @ mean
