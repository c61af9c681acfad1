"""How the classes of a new task relate to those of the source task: the distributions that Co-Tuning learns first.

You et al., "Co-Tuning for Transfer Learning", NeurIPS 2020. Run once before training, in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.functional.precision import full_precision

# the inverse regularisation strengths that the paper's code tries
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4)
SCALES = (1e-2, 1e2)
HELD_OUT = 5  # one image in so many


@full_precision
def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of ``-sum over s of targets_s log softmax(logits)_s``.

    Args:
        logits: shape ``[N, S]``.
        targets: distributions, shape ``[N, S]``.

    Returns:
        0-d tensor.

    >>> soft_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))  # log 4
    tensor(1.3863)
    """
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


@full_precision
def source_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The source classifier's softmax at a temperature: logits ``[N, S]`` to probabilities ``[N, S]``.

    >>> source_probabilities(torch.tensor([[2.0, 0.0]]), temperature=2.0)
    tensor([[0.7311, 0.2689]])
    """
    return (logits / temperature).softmax(dim=1)


def direct_relationship(probabilities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """``p(source class | class)`` as the mean source prediction of each class's images.

    Args:
        probabilities: the source classifier's predictions, shape ``[N, S]``.
        labels: class indices, shape ``[N]``.
        num_classes: number of classes ``K``.

    Returns:
        float64, shape ``[K, S]``, rows sum to 1. A class without images has the mean of all predictions.

    >>> direct_relationship(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]), 2)
    tensor([[0.7500, 0.2500],
            [0.0000, 1.0000]], dtype=torch.float64)
    """
    probabilities = probabilities.double()
    members = F.one_hot(labels, num_classes).to(probabilities).T  # a product: index_add's order is not fixed on a GPU
    counts = members.sum(dim=1, keepdim=True)
    return torch.where(counts > 0, members @ probabilities / counts.clamp(min=1), probabilities.mean(dim=0))


def reverse_relationship(
    probabilities: Tensor, labels: Tensor, num_classes: int, *, calibrate: bool = True, seed: int = 0
) -> Tensor:
    """``p(source class | class)`` by Bayes' rule from ``p(class | source class)``, which is learned.

    A logistic regression (no intercept) predicts the class from the source classifier's probabilities. One image in
    five of each class, at least one of two, is held out: these choose the strength of the regularisation, by accuracy
    (of equal ones by likelihood), and calibrate the regression, by one factor on its logits. Then
    ``p(class | source class s)`` is its softmax at the one-hot vector of ``s``, and the rows of
    ``p(class | s) p(s)``, with ``p(s)`` the mean source prediction of all images, are divided by their sums.

    It costs 17 regressions of ``N x S x K`` products an iteration: with 1,000 source classes 15 seconds on one core for
    1,500 images of 50 classes, three minutes for 4,800 of 200.

    Args:
        probabilities: the source classifier's predictions, shape ``[N, S]``.
        labels: class indices, shape ``[N]``.
        num_classes: number of classes ``K``.
        calibrate: find the factor; otherwise it is 1.
        seed: of the choice which images are held out.

    Returns:
        float64, shape ``[K, S]``, rows sum to 1.
    """
    probabilities = probabilities.double()
    held_out = _held_out(labels, seed)
    weights, scale = torch.empty(0), 1.0
    if held_out.any():
        kept, rest = probabilities[~held_out], probabilities[held_out]
        best: tuple[float, float] | None = None
        start = None
        for strength in STRENGTHS:  # from the strongest regularisation on, each from where the last one ended
            start = logistic_regression(kept, labels[~held_out], num_classes, strength, start)
            logits = rest @ start.T
            accuracy = float((logits.argmax(dim=1) == labels[held_out]).double().mean())
            score = (accuracy, -float(F.cross_entropy(logits, labels[held_out])))
            if best is None or score > best:
                best, weights = score, start
        if calibrate:
            scale = calibrated_scale(rest @ weights.T, labels[held_out])
    else:  # one image a class: nothing to choose by
        weights = logistic_regression(probabilities, labels, num_classes)
    class_given_source = (scale * weights.T).softmax(dim=1)  # [S, K]
    joint = (class_given_source * probabilities.mean(dim=0)[:, None]).T
    return joint / joint.sum(dim=1, keepdim=True)


def logistic_regression(
    inputs: Tensor,
    labels: Tensor,
    num_classes: int,
    strength: float = 1.0,
    start: Tensor | None = None,
    intercept: bool = False,
) -> Tensor:
    """Weights ``W`` that minimise ``|W|^2 / 2 + strength * sum over i of cross_entropy(W x_i, y_i)``, in float64.

    Args:
        inputs: shape ``[N, S]``.
        labels: class indices, shape ``[N]``.
        num_classes: number of classes ``K``.
        strength: inverse strength of the regularisation, scikit-learn's ``C``.
        start: where the search begins, shape ``[K, S]``; default: zeros.
        intercept: the last input is a constant 1, and its weight is not regularised.

    Returns:
        float64, shape ``[K, S]``.
    """
    inputs = inputs.double()
    weights = inputs.new_zeros(num_classes, inputs.shape[1]) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    penalty = 1 / (2 * strength * len(labels))
    regularized = inputs.shape[1] - intercept

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weights.T, labels) + penalty * weights[:, :regularized].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weights.detach()


def calibrated_scale(logits: Tensor, labels: Tensor) -> float:
    """The factor on all logits under which the labels are most likely: temperature scaling (Guo et al. 2017).

    Between 0.01 and 100: where the logits are right about all labels, there is no largest one.

    Args:
        logits: shape ``[N, K]``.
        labels: class indices, shape ``[N]``.
    """
    logits = logits.double()
    chosen = logits.gather(1, labels[:, None]).mean()

    def slope(scale: float) -> float:  # of the cross-entropy, which is convex in the factor
        return float(((scale * logits).softmax(dim=1) * logits).sum(dim=1).mean() - chosen)

    low, high = SCALES
    if slope(low) >= 0:
        return low
    if slope(high) <= 0:
        return high
    for _ in range(100):
        middle = float((low * high) ** 0.5)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float((low * high) ** 0.5)


def _held_out(labels: Tensor, seed: int) -> Tensor:
    """A mask ``[N]`` of one image in five of each class, and of one where a class has two to four."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(labels), dtype=torch.bool)
    shuffled = labels.cpu()[order]
    for label in range(int(labels.max()) + 1):
        members = order[shuffled == label]
        count = len(members) // HELD_OUT if len(members) >= HELD_OUT else int(len(members) > 1)
        mask[members[:count]] = True
    return mask.to(labels.device)
