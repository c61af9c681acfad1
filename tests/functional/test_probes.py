"""Nearest neighbours and the linear probe against float64 loops and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from framework.functional import linear_probe, nearest_neighbour_scores, probes

CLASSES = 4


def clusters(count: int, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping clusters with features of very different means and scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    features = centres[labels] + torch.randn(count, width, generator=generator)
    return features * torch.logspace(-1, 1, width) + torch.linspace(-3, 3, width), labels


# ---------------------------------------------------------------------- nearest neighbours
def votes(features: Tensor, bank: Tensor, labels: Tensor, neighbours: int, temperature: float) -> list[list[float]]:
    """Image by image, in float64."""
    rows = []
    for image in features.double().tolist():
        cosines = []
        for other, label in zip(bank.double().tolist(), labels.tolist(), strict=True):
            product = sum(a * b for a, b in zip(image, other, strict=True))
            cosines.append((product / math.hypot(*image) / math.hypot(*other), label))
        row = [0.0] * CLASSES
        for cosine, label in sorted(cosines, reverse=True)[:neighbours]:
            row[label] += math.exp(cosine / temperature)
        rows.append([vote / sum(row) for vote in row])
    return rows


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (70, 1.0), (200, 0.07)])
def test_votes_equal_a_loop(neighbours: int, temperature: float) -> None:
    (features, _), (bank, labels) = clusters(23, seed=1), clusters(70)
    scores = nearest_neighbour_scores(features, bank, labels, CLASSES, neighbours, temperature)
    expected = torch.tensor(votes(features, bank, labels, neighbours, temperature))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(23))


def test_votes_equal_scikit() -> None:
    (features, _), (bank, labels) = clusters(50, seed=1), clusters(200)
    reference = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    reference.fit(bank.numpy(), labels.numpy())
    scores = nearest_neighbour_scores(features, bank, labels, CLASSES)
    np.testing.assert_allclose(scores.numpy(), reference.predict_proba(features.numpy()), rtol=2e-4, atol=1e-6)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (features, _), (bank, labels) = clusters(23, seed=1), clusters(40)
    whole = nearest_neighbour_scores(features, bank, labels, CLASSES)
    for block in (1, 100, 199):  # one image at a time, and several with a last block of another size
        monkeypatch.setattr(probes, "BLOCK", block)
        torch.testing.assert_close(nearest_neighbour_scores(features, bank, labels, CLASSES), whole)


def test_a_block_bounds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (features, _), (bank, labels) = clusters(64, seed=1), clusters(100)
    sizes: list[int] = []
    topk = Tensor.topk

    def measured(self: Tensor, *arguments: int, **options: int) -> object:
        sizes.append(self.numel())
        return topk(self, *arguments, **options)

    monkeypatch.setattr(Tensor, "topk", measured)
    monkeypatch.setattr(probes, "BLOCK", 1000)
    nearest_neighbour_scores(features, bank, labels, CLASSES)
    assert max(sizes) <= 1000
    assert len(sizes) == 7


def test_any_temperature_is_finite() -> None:
    (features, _), (bank, labels) = clusters(10, seed=1), clusters(40)
    nearest = nearest_neighbour_scores(features, bank, labels, CLASSES, 1)
    cold = nearest_neighbour_scores(features, bank, labels, CLASSES, 20, temperature=1e-5)
    assert torch.equal(cold.argmax(dim=1), nearest.argmax(dim=1))
    assert cold.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_votes_under_autocast(dtype: torch.dtype) -> None:
    (features, _), (bank, labels) = clusters(23, seed=1), clusters(70)
    features, bank = features.to(dtype), bank.to(dtype)
    expected = nearest_neighbour_scores(features.float(), bank.float(), labels, CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_neighbour_scores(features, bank, labels, CLASSES), expected)


# ---------------------------------------------------------------------- linear probe
@pytest.mark.parametrize("weight_decay", [1e-3, 1e-2, 1.0])
def test_the_probe_equals_scikit(weight_decay: float) -> None:
    (features, labels), (others, _) = clusters(120), clusters(30, seed=1)
    weight, bias = linear_probe(features, labels, CLASSES, weight_decay)
    scaler = StandardScaler().fit(features.double().numpy())
    reference = LogisticRegression(C=1 / (len(labels) * weight_decay), tol=1e-10, max_iter=10_000)
    reference.fit(scaler.transform(features.double().numpy()), labels.numpy())
    np.testing.assert_allclose((weight * torch.tensor(scaler.scale_)).numpy(), reference.coef_, atol=2e-4)
    logits = (others.double() @ weight.T + bias).numpy()  # of the features as they are
    expected = reference.decision_function(scaler.transform(others.double().numpy()))
    centred = logits - logits.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred, expected - expected.mean(axis=1, keepdims=True), atol=1e-3)


@pytest.mark.parametrize("weight_decay", [1e-4, 1e-2])
def test_the_gradient_is_zero(weight_decay: float) -> None:
    features, labels = clusters(200, width=30)
    weight, bias = linear_probe(features, labels, CLASSES, weight_decay)
    mean, deviation = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
    scaled, shifted = (weight * deviation).requires_grad_(), (bias + weight @ mean).requires_grad_()
    logits = (features.double() - mean) / deviation @ scaled.T + shifted
    (F.cross_entropy(logits, labels) + weight_decay / 2 * scaled.square().sum()).backward()
    assert scaled.grad is not None
    assert shifted.grad is not None
    assert scaled.grad.norm() < 1e-5
    assert shifted.grad.norm() < 1e-5


def test_scale_and_shift_of_a_feature_play_no_part() -> None:
    (features, labels), (others, _) = clusters(80), clusters(20, seed=1)

    def logits(change: Tensor, shift: Tensor) -> Tensor:
        weight, bias = linear_probe(features.double() * change + shift, labels, CLASSES)
        return (others.double() * change + shift) @ weight.T + bias

    plain = logits(torch.ones(6), torch.zeros(6))
    torch.testing.assert_close(logits(torch.logspace(-4, 4, 6), 5 * torch.ones(6)), plain, atol=1e-4, rtol=1e-4)


def test_a_constant_feature_has_no_weight() -> None:
    features, labels = clusters(80)
    constant = torch.full((80, 2), 3.0)
    constant[::2, 0] += 4e-7  # as batches of another size round it
    weight, _ = linear_probe(torch.cat([features, constant, torch.zeros(80, 1)], dim=1), labels, CLASSES)
    assert weight[:, -3:].abs().max() < 1e-4
    without, _ = linear_probe(features, labels, CLASSES)
    torch.testing.assert_close(weight[:, :-3], without, atol=1e-4, rtol=1e-4)


def test_the_probe_is_the_same_in_any_context() -> None:
    features, labels = clusters(80)
    state = torch.random.get_rng_state()
    weight, bias = linear_probe(features, labels, CLASSES)
    with torch.inference_mode():
        found = [linear_probe(features.double() / 1, labels + 0, CLASSES)]  # tensors of that mode
    with torch.no_grad():
        found.append(linear_probe(features, labels, CLASSES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(linear_probe(features, labels, CLASSES))
    learned = features.clone().requires_grad_()
    found.append(linear_probe(learned, labels, CLASSES))
    for other_weight, other_bias in found:
        assert torch.equal(other_weight, weight)
        assert torch.equal(other_bias, bias)
        assert not other_weight.requires_grad
    assert weight.dtype == torch.float64
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_class_without_images() -> None:
    features, labels = clusters(60)
    weight, bias = linear_probe(features, labels, CLASSES + 1)
    assert not ((features.double() @ weight.T + bias).argmax(dim=1) == CLASSES).any()
    assert nearest_neighbour_scores(features, features, labels, CLASSES + 1)[:, CLASSES].eq(0).all()


def test_features_that_have_diverged_end_nothing() -> None:
    features, labels = clusters(30)
    features[3, 2] = float("nan")
    linear_probe(features, labels, CLASSES)
    nearest_neighbour_scores(features, features, labels, CLASSES)
