"""The scores against loops, numpy, scipy and scikit-learn, their bounds and invariances."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.covariance
import torch
from torch import Tensor

import framework.functional.transferability
from framework.errors import ConfigurationError
from framework.functional import h_score, leep, log_maximum_evidence, negative_conditional_entropy


def task(count: int, width: int, noise: float, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features that tell the classes, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (count - classes,), generator=generator)])
    means = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    features = means[labels] + noise * torch.randn(count, width, generator=generator, dtype=torch.float64)
    return features, labels


# more images than features, as many, fewer; features that tell all, something, nothing
TASKS = [(50, 5, 0.5), (50, 5, 5.0), (50, 5, 100.0), (40, 40, 0.5), (30, 60, 0.5), (30, 60, 5.0), (30, 60, 1000.0)]


# ---------------------------------------------------------------------- LogME
def evidence(features: np.ndarray, target: np.ndarray, alpha: float, beta: float) -> float:
    """The textbook's closed form (Bishop 2006, section 3.5), with the D x D matrix A and the posterior's mean."""
    count, width = features.shape
    matrix = alpha * np.eye(width) + beta * features.T @ features
    mean = beta * np.linalg.solve(matrix, features.T @ target)
    return float(
        count / 2 * math.log(beta)
        + width / 2 * math.log(alpha)
        - count / 2 * math.log(2 * math.pi)
        - beta / 2 * np.sum((features @ mean - target) ** 2)
        - alpha / 2 * mean @ mean
        - np.linalg.slogdet(matrix)[1] / 2
    )


def marginal(features: np.ndarray, target: np.ndarray, alpha: float, beta: float) -> float:
    """The same as the density of the targets, whose covariance is N x N: well conditioned where there is no noise."""
    count = len(features)
    covariance = np.eye(count) / beta + features @ features.T / alpha
    determinant = np.linalg.slogdet(2 * math.pi * covariance)[1]
    return float(-0.5 * (determinant + target @ np.linalg.solve(covariance, target)))


def test_the_references_are_the_marginal_density() -> None:
    features, labels = task(12, 4, 1.0)
    target = (labels == 1).double().numpy()
    covariance = np.eye(12) / 7.0 + (features @ features.T).numpy() / 3.0
    expected = scipy.stats.multivariate_normal(np.zeros(12), covariance).logpdf(target)
    for reference in (evidence, marginal):
        assert reference(features.numpy(), target, 3.0, 7.0) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("count", "width", "noise"), TASKS)
def test_log_maximum_evidence_is_the_maximum(count: int, width: int, noise: float) -> None:
    """Against a search over both hyperparameters: a grid, then scipy's simplex from the best point."""
    features, labels = task(count, width, noise)
    array, best = features.numpy(), []
    scale = math.log(float((features**2).sum()))
    for label in range(3):
        target = (labels == label).double().numpy()

        def loss(point: np.ndarray, target: np.ndarray = target) -> float:
            return -marginal(array, target, math.exp(point[0]), math.exp(point[1]))

        grid = [(a, b) for a in np.linspace(scale - 12, scale + 12, 13) for b in np.linspace(-3, 12, 13)]
        start = min(grid, key=loss)
        found = scipy.optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9})
        best.append(-found.fun / count)
    # also where the optimum lies at infinity: alpha without features that tell, beta without noise
    assert float(log_maximum_evidence(features, labels)) == pytest.approx(np.mean(best), abs=1e-10)


@pytest.mark.parametrize(("count", "width", "noise"), TASKS)
def test_the_optimum_is_a_fixed_point_of_the_paper(count: int, width: int, noise: float) -> None:
    """The update of alpha and beta, written with a matrix inverse, changes nothing where the score is reached."""
    features, labels = task(count, width, noise)
    array, total, converged = features.numpy(), [], 0
    for label in range(3):
        target, alpha, beta = (labels == label).double().numpy(), 1.0, 1.0
        for _ in range(3000):
            values = np.linalg.eigvalsh(array.T @ array).clip(0)
            mean = beta * np.linalg.solve(alpha * np.eye(width) + beta * array.T @ array, array.T @ target)
            gamma = (beta * values / (alpha + beta * values)).sum()
            before = alpha / beta
            alpha, beta = gamma / (mean @ mean), (count - gamma) / ((array @ mean - target) ** 2).sum()
            if abs(alpha / beta - before) < 1e-9 * before:
                converged += 1
                break
            if not 1e-8 < alpha / beta < 1e8:
                break
        total.append(evidence(array, target, alpha, beta) / count)
    score = float(log_maximum_evidence(features, labels))
    assert score == pytest.approx(np.mean(total), abs=1e-8 if converged == 3 else 2e-3)
    assert converged or noise == 1000.0


def test_log_maximum_evidence_invariances() -> None:
    for count, width in ((40, 6), (20, 50)):
        features, labels = task(count, width, 1.0)
        score = log_maximum_evidence(features, labels)
        rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
        order, names = torch.randperm(count), torch.tensor([7, 2, 90])
        for other in (
            log_maximum_evidence(features @ rotation, labels),
            log_maximum_evidence(1000 * features, labels),
            log_maximum_evidence(torch.cat([features, torch.zeros(count, 9)], dim=1), labels),
            log_maximum_evidence(features[order], labels[order]),
            log_maximum_evidence(features, names[labels]),
        ):
            torch.testing.assert_close(other, score, rtol=1e-9, atol=1e-9)


def test_log_maximum_evidence_of_useless_and_of_perfect_features() -> None:
    labels = torch.arange(30) % 3
    null = log_maximum_evidence(torch.zeros(30, 4), labels)
    variance = 10 / 30  # of an indicator about zero
    assert float(null) == pytest.approx(-0.5 * (math.log(2 * math.pi * variance) + 1), rel=1e-12)
    useless = log_maximum_evidence(1e-3 * torch.randn(30, 4), labels)
    assert null - 1e-9 <= useless < null + 0.2
    perfect = log_maximum_evidence(
        torch.nn.functional.one_hot(labels, 3), labels
    )  # no noise left: bounded, not infinite
    assert perfect.isfinite()
    assert perfect > useless + 5


# ---------------------------------------------------------------------- LEEP, NCE
def test_leep_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(40, 5, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    labels = torch.randint(3, (40,), generator=generator)
    joint = [[0.0] * 5 for _ in range(3)]
    for i in range(40):
        for z in range(5):
            joint[int(labels[i])][z] += float(probabilities[i, z]) / 40
    total = 0.0
    for i in range(40):
        likelihood = 0.0
        for z in range(5):
            given = joint[int(labels[i])][z] / sum(joint[y][z] for y in range(3))
            likelihood += given * float(probabilities[i, z])
        total += math.log(likelihood) / 40
    assert float(leep(probabilities, labels)) == pytest.approx(total, rel=1e-12)
    # a source class that no image can be: no division by its zero probability
    wider = torch.cat([probabilities, torch.zeros(40, 2, dtype=torch.float64)], dim=1)
    assert float(leep(wider, labels)) == pytest.approx(total, rel=1e-12)


def test_negative_conditional_entropy_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    source, labels = torch.randint(4, (60,), generator=generator), torch.randint(3, (60,), generator=generator)
    total = 0.0
    for i in range(60):
        same = [int(labels[j]) for j in range(60) if source[j] == source[i]]
        total += math.log(same.count(int(labels[i])) / len(same)) / 60
    assert float(negative_conditional_entropy(source, labels)) == pytest.approx(total, rel=1e-12)
    # the names of the classes play no part
    names = torch.tensor([70, 3, -2, 9])
    assert float(negative_conditional_entropy(names[source], labels + 5)) == pytest.approx(total, rel=1e-12)


def test_leep_of_certain_predictions_is_nce() -> None:
    """Nguyen 2020: LEEP is at least NCE plus the mean log probability of the predictions, which is 0 here."""
    generator = torch.Generator().manual_seed(1)
    source, labels = torch.randint(4, (60,), generator=generator), torch.randint(3, (60,), generator=generator)
    certain = leep(torch.nn.functional.one_hot(source, 4), labels)
    torch.testing.assert_close(certain, negative_conditional_entropy(source, labels))
    probabilities = torch.randn(60, 4, generator=generator, dtype=torch.float64).softmax(1)
    predicted = probabilities.max(1)
    bound = negative_conditional_entropy(predicted.indices, labels) + predicted.values.log().mean()
    assert leep(probabilities, labels) >= bound


def test_bounds_of_leep_and_nce() -> None:
    labels = torch.arange(12) % 3
    assert float(negative_conditional_entropy(labels + 4, labels)) == 0
    assert float(leep(torch.nn.functional.one_hot(labels, 3), labels)) == 0
    nothing = torch.full((12, 5), 0.2)
    assert float(leep(nothing, labels)) == pytest.approx(-math.log(3), rel=1e-6)  # the marginal's entropy
    assert float(negative_conditional_entropy(torch.zeros(12).long(), labels)) == pytest.approx(-math.log(3))


# ---------------------------------------------------------------------- H-score
def between_classes(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    conditional = np.zeros_like(features)
    for label in np.unique(labels):
        conditional[labels == label] = features[labels == label].mean(axis=0)
    return np.cov(conditional, rowvar=False, bias=True)


@pytest.mark.parametrize(("count", "width", "noise"), TASKS[:3])
def test_h_score_against_numpy(count: int, width: int, noise: float) -> None:
    features, labels = task(count, width, noise)
    array = features.numpy()
    covariance = np.cov(array, rowvar=False, bias=True)
    expected = np.trace(np.linalg.pinv(covariance) @ between_classes(array, labels.numpy()))
    assert float(h_score(features, labels)) == pytest.approx(expected, rel=1e-10)
    assert 0 < expected < 2


@pytest.mark.parametrize(("count", "width", "noise"), TASKS)
def test_shrunk_h_score_against_scikit_learn(count: int, width: int, noise: float) -> None:
    features, labels = task(count, width, noise)
    array = features.numpy()
    fitted = sklearn.covariance.LedoitWolf().fit(array)
    between = (1 - fitted.shrinkage_) * between_classes(array, labels.numpy())
    expected = np.trace(np.linalg.inv(fitted.covariance_) @ between)
    assert 0 < fitted.shrinkage_ <= 1
    assert float(h_score(features, labels, shrinkage=True)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_h_score_says_nothing_with_few_images_and_the_shrunk_one_does() -> None:
    features, labels = task(30, 60, 1.0)
    shuffled = labels[torch.randperm(30)]
    assert float(h_score(features, labels)) == pytest.approx(2, rel=1e-9)
    assert float(h_score(features, shuffled)) == pytest.approx(2, rel=1e-9)
    assert h_score(features, labels, shrinkage=True) > 0.4 + h_score(features, shuffled, shrinkage=True)


def test_h_score_invariances() -> None:
    features, labels = task(40, 6, 1.0)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    order = torch.randperm(40)
    for shrinkage in (False, True):
        score = h_score(features, labels, shrinkage)
        others = [features @ rotation + 3.0, 5 * features]
        if not shrinkage:  # of any invertible map, and of features that add nothing
            others += [
                features @ torch.randn(6, 6, dtype=torch.float64),
                torch.cat([features, features, 0 * features], 1),
            ]
        for other in others:
            torch.testing.assert_close(h_score(other, labels, shrinkage), score, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(h_score(features[order], labels[order], shrinkage), score)
        assert float(h_score(torch.ones(40, 6), labels, shrinkage)) == 0


# ---------------------------------------------------------------------- all
SCORES: list[Callable[[Tensor, Tensor], Tensor]] = [
    log_maximum_evidence,
    h_score,
    lambda features, labels: h_score(features, labels, shrinkage=True),
    lambda features, labels: leep(features.softmax(dim=1), labels),
    lambda features, labels: negative_conditional_entropy(features.argmax(dim=1), labels),
]
each_score = pytest.mark.parametrize("score", SCORES, ids=["logme", "h", "shrunk h", "leep", "nce"])


@each_score
def test_better_features_score_higher(score: Callable[[Tensor, Tensor], Tensor]) -> None:
    values = [float(score(*task(120, 8, noise, seed=3))) for noise in (0.1, 1.0, 30.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1] + 0.1


@each_score
def test_scores_are_of_double_precision_without_a_gradient(score: Callable[[Tensor, Tensor], Tensor]) -> None:
    features, labels = task(60, 8, 1.0)
    value = score(features.float().requires_grad_(), labels)
    assert (value.dtype, value.shape, value.requires_grad) == (torch.float64, (), False)
    torch.testing.assert_close(value, score(features.float().double(), labels), rtol=1e-6, atol=1e-6)
    assert score(features, labels.int()) == score(features, labels)


@pytest.mark.parametrize(
    ("score", "arguments", "message"),
    [
        (log_maximum_evidence, (torch.zeros(4, 2), torch.zeros(3).long()), r"\[N, D\].*got \[4, 2\] and \[3\]"),
        (h_score, (torch.zeros(4), torch.zeros(4).long()), r"got \[4\]"),
        (h_score, (torch.zeros(4, 2), torch.zeros(4)), "to be class indices"),
        (h_score, (torch.zeros(4, 2), torch.zeros(4).long()), "at least two classes, but got 1"),
        (log_maximum_evidence, (torch.full((4, 2), math.nan), torch.arange(4)), "to be finite"),
        (leep, (torch.ones(4, 2), torch.arange(4)), "to sum to 1"),
        (leep, (torch.tensor([[2.0, -1.0]] * 4), torch.arange(4)), "to sum to 1"),
        (negative_conditional_entropy, (torch.arange(3), torch.arange(4)), "`source_labels` to be 4 class indices"),
        (negative_conditional_entropy, (torch.rand(4), torch.arange(4)), "`source_labels` to be 4 class indices"),
        (negative_conditional_entropy, (torch.arange(0), torch.arange(0)), "`labels` to be class indices"),
    ],
)
def test_mistakes(score: Callable[..., Tensor], arguments: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        score(*arguments)


def test_examples() -> None:
    assert doctest.testmod(framework.functional.transferability, extraglobs={"torch": torch}) == (0, 6)
