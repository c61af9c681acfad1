"""Scores of how well features or a source classifier fit a new task, before anything is trained.

All are computed in float64 and are higher where the task fits better. They rank networks on one data set; their values
mean nothing between data sets. Each needs one pass of the labelled images through the pretrained network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.errors import ConfigurationError

LARGEST = 1e15  # bounds of the ratio of precisions, relative to the largest eigenvalue: what is beyond changes nothing


def log_maximum_evidence(features: Tensor, labels: Tensor, iterations: int = 10_000) -> Tensor:
    """LogME: the log evidence of a Bayesian linear model from features to classes, at its best hyperparameters.

    For each class, its indicator ``y`` (1 for its images, else 0) is modelled as ``y = F w + noise`` with a prior ``w ~
    N(0, 1/alpha)`` and noise of precision ``beta``, without an intercept. The score is the evidence ``log p(y | F,
    alpha, beta)``, maximised over both and divided by the number of images, on average over the classes.

    You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", ICML 2021, arXiv:2102.11005.
    One singular value decomposition serves all classes, and the fixed-point iteration runs in the one variable ``t =
    alpha / beta`` as in the longer version (You et al., "Ranking and Tuning Pre-trained Models", JMLR 2022), for all
    classes at once and until it stands still; both papers' codes stop earlier.

    Args:
        features: shape ``[N, D]``.
        labels: class indices, shape ``[N]``; classes without an image do not count.
        iterations: most steps of the iteration.

    Returns:
        0-d tensor, float64.

    Raises:
        ConfigurationError: shapes that do not fit, fewer than two classes, or features that are not finite.

    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> good = torch.tensor([[1.0, 0.1], [0.9, 0.0], [0.1, 1.0], [0.0, 0.9]])
    >>> log_maximum_evidence(good, labels) > log_maximum_evidence(good[[0, 2, 1, 3]], labels)
    tensor(True)
    """
    features, labels, classes = _checked(features, labels)
    targets = torch.stack([(labels == label).double() for label in classes])  # [K, N]
    left, singular, _ = torch.linalg.svd(features, full_matrices=False)
    count, squares = len(features), singular.square()  # [R]
    projected = (targets @ left).square()  # [K, R]
    total = targets.square().sum(dim=1)
    beyond = (total - projected.sum(dim=1)).clamp(min=0) if count > len(singular) else torch.zeros_like(total)
    if squares[0] == 0:  # no feature says anything: noise alone
        return _evidence(torch.ones_like(total), projected, squares, beyond, count).mean() / count

    low, high = squares[0] / LARGEST, squares[0] * LARGEST
    ratio = squares.mean().expand_as(total).clone()  # t
    for _ in range(iterations):
        shrunk = ratio[:, None] + squares  # [K, R]
        effective = (squares / shrunk).sum(dim=1)  # gamma, the parameters that the data determine
        weights = (squares * projected / shrunk.square()).sum(dim=1)  # |m|^2 of the posterior's mean m
        residual = (ratio[:, None] * projected.sqrt() / shrunk).square().sum(dim=1) + beyond  # |y - F m|^2
        # alpha = gamma / |m|^2 and beta = (N - gamma) / |y - F m|^2
        following = effective * residual / (weights * (count - effective)).clamp(min=torch.finfo(torch.float64).tiny)
        following = following.clamp(low, high)
        still = (following - ratio).abs() <= 1e-10 * ratio
        ratio = following
        if bool(still.all()):
            break
    return _evidence(ratio, projected, squares, beyond, count).mean() / count


def _evidence(ratio: Tensor, projected: Tensor, squares: Tensor, beyond: Tensor, count: int) -> Tensor:
    """Log evidence ``[K]`` for given ``t``, at the best ``alpha``.

    ``y`` is normal with the covariance ``(F F^T + t) / alpha``, whose eigenvalues are ``(s^2 + t) / alpha`` and, beyond
    the features' span, ``t / alpha``.
    """
    eigenvalues = ratio[:, None] + squares
    outside = count - len(squares)
    scale = ((projected / eigenvalues).sum(dim=1) + beyond / ratio) / count  # 1 / alpha
    determinant = eigenvalues.log().sum(dim=1) + outside * ratio.log() + count * scale.log()
    evidence: Tensor = -0.5 * (determinant + count * (1 + torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))))
    return evidence


def leep(probabilities: Tensor, labels: Tensor) -> Tensor:
    """LEEP: mean log likelihood of the labels, predicted through the source classes that the images get.

    With the source classifier's probabilities ``q(z | x)`` and ``P(y, z) = mean over i of [y_i = y] q(z | x_i)``, the
    score is ``mean over i of log(sum over z of P(y_i | z) q(z | x_i))``, at most 0.

    Nguyen et al., "LEEP: A New Measure to Evaluate Transferability of Learned Representations", ICML 2020,
    arXiv:2002.12462.

    Args:
        probabilities: of the source classes, shape ``[N, Z]``; each row sums to 1.
        labels: class indices of the new task, shape ``[N]``.

    Returns:
        0-d tensor, float64.

    >>> leep(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, 0])).exp()
    tensor(1., dtype=torch.float64)
    """
    probabilities, labels, classes = _checked(probabilities, labels, "probabilities")
    if (probabilities < 0).any() or ((probabilities.sum(dim=1) - 1).abs() > 1e-3).any():
        raise ConfigurationError("Expected `probabilities` to sum to 1 in each row, but got others.")
    indicators = (labels == classes[:, None]).double()  # [K, N]
    joint = indicators @ probabilities  # [K, Z]
    # a source class that is never predicted has no images to say what it means, nor a weight in the sum
    conditional = joint / joint.sum(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    expected = probabilities @ conditional.T  # [N, K]
    score: Tensor = (expected * indicators.T).sum(dim=1).log().mean()
    return score


def negative_conditional_entropy(source_labels: Tensor, labels: Tensor) -> Tensor:
    """NCE: minus the entropy of the labels given the source labels, in nats: at most 0, where these determine those.

    ``sum over y and z of P(y, z) log P(y | z)`` with the empirical distribution of the pairs.

    Tran et al., "Transferability and Hardness of Supervised Classification Tasks", ICCV 2019, arXiv:1908.08142.

    Args:
        source_labels: of the source task, shape ``[N]``; of images without such labels, the source classifier's
            predictions.
        labels: class indices of the new task, shape ``[N]``.

    Returns:
        0-d tensor, float64.

    >>> negative_conditional_entropy(torch.tensor([5, 5, 7, 7]), torch.tensor([0, 1, 2, 2]))
    tensor(-0.3466, dtype=torch.float64)
    """
    _check_labels(labels)
    if source_labels.shape != labels.shape or source_labels.is_floating_point():
        raise ConfigurationError(
            f"Expected `source_labels` to be {len(labels)} class indices, but got {source_labels.dtype} of shape "
            f"{list(source_labels.shape)}."
        )
    labels = torch.unique(labels.detach().cpu(), return_inverse=True)[1]
    given = torch.unique(source_labels.detach().cpu(), return_inverse=True)[1]
    counts = torch.zeros(int(given.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    counts.index_put_((given, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    conditional = counts / counts.sum(dim=1, keepdim=True)
    entropy: Tensor = torch.special.xlogy(counts, conditional).sum() / len(labels)
    return entropy


def h_score(features: Tensor, labels: Tensor, shrinkage: bool = False) -> Tensor:
    """H-score: how much of the features' variance is between the classes, ``tr(cov(F)^-1 cov(E[F | y]))``.

    At most the number of classes less one. Where there are fewer images than features the covariance is singular and
    this score, with its pseudo-inverse, is that bound whatever the labels: take ``shrinkage``.

    Bao et al., "An Information-Theoretic Approach to Transferability in Task Transfer Learning", ICIP 2019. With
    ``shrinkage``: Ibrahim, Ponomareva and Mazumder, "Newer is not always better: Rethinking transferability metrics,
    their peculiarities, stability and performance", 2021, arXiv:2110.06893: the covariance is ``(1 - a) cov(F) + a
    tr(cov(F)) / D``, with ``a`` of Ledoit and Wolf (2004), and the score ``(1 - a) tr(...)``.

    Args:
        features: shape ``[N, D]``.
        labels: class indices, shape ``[N]``.
        shrinkage: shrink the covariance towards a multiple of the identity.

    Returns:
        0-d tensor, float64.

    >>> h_score(torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), torch.tensor([0, 0, 1, 1])).round(decimals=6)
    tensor(1., dtype=torch.float64)
    """
    features, labels, classes = _checked(features, labels)
    centred = features - features.mean(dim=0)
    indicators = (labels == classes[:, None]).double()
    counts = indicators.sum(dim=1, keepdim=True)
    means = indicators @ centred / counts  # [K, D]
    weighted = means * (counts / len(features)).sqrt()  # their Gram matrix is cov(E[F | y])
    if not shrinkage:
        # in the basis of the principal components, of which those without variance do not count
        _, singular, components = torch.linalg.svd(centred, full_matrices=False)
        tolerance = singular[0] * max(centred.shape) * torch.finfo(torch.float64).eps
        kept = singular > tolerance
        between = weighted @ components[kept].T
        between_share: Tensor = (between.square() / (singular[kept].square() / len(features))).sum()
        return between_share
    covariance = centred.T @ centred / len(features)
    amount, variance = _ledoit_wolf(centred, covariance)
    if variance == 0:
        return torch.zeros((), dtype=torch.float64)
    if amount == 0:
        return h_score(features, labels)
    shrunk = (1 - amount) * covariance + amount * variance * torch.eye(len(covariance), dtype=torch.float64)
    score: Tensor = (1 - amount) * (weighted * torch.linalg.solve(shrunk, weighted.T).T).sum()
    return score


def _ledoit_wolf(centred: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The shrinkage ``a`` in [0, 1] of Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", 2004, and the variance ``tr(cov) / D`` that it shrinks to."""
    count, width = centred.shape
    variance = covariance.trace() / width
    squared = covariance.square().sum()
    distance = (squared - width * variance.square()) / width  # d^2: of the covariance from the multiple of the identity
    # b^2: of one image's outer product from the covariance, of the mean of N of them
    noise = (centred.square().sum(dim=1).square().mean() - squared) / (width * count)
    noise = torch.minimum(noise, distance)
    return (noise / distance).clamp(0, 1) if distance > 0 else torch.zeros((), dtype=torch.float64), variance


def _checked(features: Tensor, labels: Tensor, name: str = "features") -> tuple[Tensor, Tensor, Tensor]:
    """Both on the CPU, the first in float64; and the classes that occur."""
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ConfigurationError(
            f"Expected `{name}` [N, D] and `labels` [N], but got {list(features.shape)} and {list(labels.shape)}."
        )
    _check_labels(labels)
    features = features.detach().cpu().double()
    if not features.isfinite().all():
        raise ConfigurationError(f"Expected `{name}` to be finite, but some are infinite or not a number.")
    labels = labels.detach().cpu()
    classes = torch.unique(labels)
    if len(classes) < 2:
        raise ConfigurationError(f"Expected `labels` of at least two classes, but got {len(classes)}.")
    return features, labels, classes


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 1 or labels.is_floating_point() or not len(labels):
        raise ConfigurationError(
            f"Expected `labels` to be class indices [N], but got {labels.dtype} of shape {list(labels.shape)}."
        )
