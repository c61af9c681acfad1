"""Co-Tuning's relationship: against scikit-learn and NumPy, step by step and whole."""

from __future__ import annotations

import doctest
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import framework.functional.task_relationship as module
from framework.functional.task_relationship import (
    calibrated_scale,
    direct_relationship,
    logistic_regression,
    reverse_relationship,
    soft_cross_entropy,
)


def predictions(
    images: int = 90, source: int = 6, classes: int = 3, sharpness: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Source probabilities that lean on the class: class ``k`` on the source classes ``2k`` and ``2k + 1``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    logits = torch.randn(images, source, generator=generator)
    logits[torch.arange(images), 2 * labels] += sharpness
    logits[torch.arange(images), 2 * labels + 1] += sharpness / 2
    return logits.softmax(1), labels


def by_scikit(inputs: np.ndarray, labels: np.ndarray, strength: float) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = LogisticRegression(C=strength, fit_intercept=False, tol=1e-10, max_iter=10_000)
        return np.asarray(fitted.fit(inputs, labels).coef_)


# ------------------------------------------------------------------ the steps
@pytest.mark.parametrize("strength", [1e-3, 1.0, 300.0])
def test_logistic_regression_against_scikit(strength: float) -> None:
    inputs, labels = predictions()
    found = logistic_regression(inputs, labels, 3, strength)
    assert found.dtype == torch.float64
    expected = by_scikit(inputs.double().numpy(), labels.numpy(), strength)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5 * max(1, np.abs(expected).max()))


def test_logistic_regression_does_not_depend_on_its_start() -> None:
    inputs, labels = predictions()
    first = logistic_regression(inputs, labels, 3, 10.0)
    again = logistic_regression(inputs, labels, 3, 10.0, start=torch.randn(3, 6, dtype=torch.float64))
    torch.testing.assert_close(first, again, rtol=0, atol=1e-4)


def likelihood(logits: np.ndarray, labels: np.ndarray, scale: float) -> float:
    scaled = scale * logits
    return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("true_scale", [0.3, 1.0, 4.0])
def test_calibrated_scale_is_the_minimum_of_the_cross_entropy(true_scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 3, generator=generator).double()
    labels = torch.multinomial((true_scale * logits).softmax(1), 1, generator=generator)[:, 0]
    found = calibrated_scale(logits, labels)
    assert found == pytest.approx(true_scale, rel=0.3)
    grid = np.exp(np.linspace(np.log(0.01), np.log(100), 4001))
    best = min(grid, key=lambda scale: likelihood(logits.numpy(), labels.numpy(), scale))
    assert found == pytest.approx(best, rel=2.5e-3)  # the grid's step
    # a stationary point of the independent cross-entropy
    up, down = (likelihood(logits.numpy(), labels.numpy(), found * factor) for factor in (1 + 1e-4, 1 - 1e-4))
    assert abs(up - down) / (2e-4 * found) < 1e-6


def test_calibrated_scale_stays_within_bounds() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert calibrated_scale(logits, torch.tensor([0, 1])) == 100
    assert calibrated_scale(logits, torch.tensor([1, 0])) == 0.01


# ------------------------------------------------------------------ whole
def test_direct_against_a_loop() -> None:
    probabilities, labels = predictions(images=31)
    found = direct_relationship(probabilities, labels, 4)
    for label in range(3):
        rows = [probabilities[i].double() for i in range(31) if labels[i] == label]
        torch.testing.assert_close(found[label], sum(rows) / len(rows))  # type: ignore[arg-type]
    torch.testing.assert_close(found[3], probabilities.double().mean(0))  # a class without images
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)


def reverse_by_numpy(probabilities: Tensor, labels: Tensor, calibrate: bool) -> np.ndarray:
    """The paper's code, step by step, with scikit-learn's regression."""
    held_out = module._held_out(labels, 0).numpy()
    x, y = probabilities.double().numpy(), labels.numpy()
    candidates = []
    for strength in (1e4, 3e3, 1e3, 3e2, 1e2, 3e1, 1e1, 3.0, 1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4):
        weights = by_scikit(x[~held_out], y[~held_out], strength)
        logits = x[held_out] @ weights.T
        accuracy = float((logits.argmax(1) == y[held_out]).mean())
        candidates.append((accuracy, -likelihood(logits, y[held_out], 1.0), strength, weights))
    weights = max(candidates, key=lambda candidate: candidate[:2])[3]
    scale = 1.0
    if calibrate:
        grid = np.exp(np.linspace(np.log(0.01), np.log(100), 20_001))
        scale = min(grid, key=lambda value: likelihood(x[held_out] @ weights.T, y[held_out], value))
    powers = np.exp(scale * weights.T)
    class_given_source = powers / powers.sum(1, keepdims=True)
    found = np.zeros((weights.shape[0], x.shape[1]))
    for label in range(weights.shape[0]):
        for source in range(x.shape[1]):
            found[label, source] = class_given_source[source, label] * x[:, source].mean()
        found[label] /= found[label].sum()
    return found


@pytest.mark.parametrize("calibrate", [True, False])
def test_reverse_against_scikit_and_numpy(calibrate: bool) -> None:
    probabilities, labels = predictions(images=150, sharpness=1.0)
    found = reverse_relationship(probabilities, labels, 3, calibrate=calibrate)
    expected = reverse_by_numpy(probabilities, labels, calibrate)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3 if calibrate else 1e-4)


def test_calibration_changes_the_result() -> None:
    probabilities, labels = predictions(images=150, sharpness=1.0)
    first, second = (reverse_relationship(probabilities, labels, 3, calibrate=value) for value in (True, False))
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("images", [90, 6, 3])  # three: one image a class, none to hold out
def test_rows_are_distributions_that_find_the_related_classes(images: int) -> None:
    probabilities, labels = predictions(images, sharpness=4.0)
    found = reverse_relationship(probabilities, labels, 3)
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))
    assert (found >= 0).all()
    assert found.argmax(1).tolist() == [0, 2, 4]


def test_reverse_is_the_same_each_time_and_leaves_the_random_numbers_alone() -> None:
    probabilities, labels = predictions()
    state = torch.get_rng_state()
    first = reverse_relationship(probabilities, labels, 3)
    assert torch.equal(first, reverse_relationship(probabilities, labels, 3))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():  # where it is called from
        assert torch.equal(first, reverse_relationship(probabilities, labels, 3))


def test_one_image_in_five_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 23 + [1] * 5 + [2] * 4 + [3] * 1 + [4] * 2)
    mask = module._held_out(labels, 0)
    assert [int(mask[labels == label].sum()) for label in range(5)] == [4, 1, 1, 0, 1]


# ------------------------------------------------------------------ the loss
def test_soft_cross_entropy_against_a_loop_and_gradients() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(5, 4, dtype=torch.float64)
    targets /= targets.sum(1, keepdim=True)
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        normalizer = sum(np.exp(value) for value in row)
        total -= sum(target[s] * np.log(np.exp(row[s]) / normalizer) for s in range(4))
    assert float(soft_cross_entropy(logits, targets)) == pytest.approx(total / 5)
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, targets), logits)


def test_soft_cross_entropy_in_float32_under_autocast() -> None:
    logits, targets = torch.randn(16, 50).bfloat16(), torch.rand(16, 50).softmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_cross_entropy(logits, targets)
    assert torch.equal(found, soft_cross_entropy(logits.float(), targets))


def test_examples() -> None:
    assert doctest.testmod(module, extraglobs={"torch": torch}) == (0, 3)
