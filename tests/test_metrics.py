"""Metrics against float64 loops, closed forms and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from framework import metrics
from framework.functional import linear_probe, nearest_neighbour_scores
from framework.metrics import CalibrationError, InformationMaximization, ProbeAccuracy


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def information(logits: torch.Tensor) -> float:
    """``H(mean p) - mean H(p)`` image by image."""
    probabilities = [softmax(row) for row in logits.double().tolist()]
    classes = range(logits.shape[1])
    mean = [sum(p[k] for p in probabilities) / len(probabilities) for k in classes]
    conditional = sum(-p * math.log(p) for row in probabilities for p in row if p > 0) / len(probabilities)
    return sum(-m * math.log(m) for m in mean if m > 0) - conditional


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_information_equals_a_loop(scale: float) -> None:
    logits = scale * torch.randn(57, 5)
    metric = InformationMaximization(5)
    metric.update(logits)
    assert metric.compute().item() == pytest.approx(information(logits), abs=2e-6)


def test_information_does_not_depend_on_the_batches() -> None:
    logits = torch.randn(50, 4)
    whole, parts = InformationMaximization(4), InformationMaximization(4)
    whole.update(logits)
    for part in logits.split([1, 20, 29]):
        parts.update(part)
    torch.testing.assert_close(whole.compute(), parts.compute())
    parts.reset()
    parts.update(logits[:7])
    assert parts.compute().item() == pytest.approx(information(logits[:7]), abs=1e-6)


def test_information_bounds() -> None:
    metric = InformationMaximization(6)
    metric.update(100 * torch.eye(6).repeat(3, 1))  # confident, evenly spread
    assert metric.compute().item() == pytest.approx(math.log(6), abs=1e-6)
    assert metric.marginal_entropy().item() == pytest.approx(math.log(6), abs=1e-6)
    metric.reset()
    metric.update(torch.tensor([[100.0, 0, 0, 0, 0, 0]]).repeat(9, 1))  # collapsed
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)
    assert metric.marginal_entropy().item() == pytest.approx(0, abs=1e-6)
    metric.reset()
    metric.update(torch.zeros(9, 6))  # undecided
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)
    for _ in range(20):
        metric.reset()
        metric.update(torch.randn(10, 6) * 10 * torch.rand(()))
        assert -1e-6 <= metric.compute() <= math.log(6) + 1e-6


def test_information_of_two_processes() -> None:
    """All states are sums, so that the processes' states add up to the whole."""
    logits = torch.randn(21, 3)
    whole, first, second = (InformationMaximization(3) for _ in range(3))
    whole.update(logits)
    first.update(logits[:12])
    second.update(logits[12:])
    for name, reduction in first._reductions.items():
        stacked = torch.stack([getattr(first, name), getattr(second, name)])
        setattr(first, name, reduction(stacked))
    first._computed = None
    torch.testing.assert_close(first.compute(), whole.compute())


def test_information_in_half_precision() -> None:
    logits = torch.randn(100, 5).bfloat16()
    metric = InformationMaximization(5)
    metric.update(logits)
    assert metric.compute().dtype == torch.float32
    assert metric.compute().item() == pytest.approx(information(logits), abs=1e-5)


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error, image by image (Guo et al. 2017, eq. 3)."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        probabilities = softmax(row)
        confidence = max(probabilities)
        bin_ = min(int(confidence * bins), bins - 1)
        members.setdefault(bin_, []).append((confidence, probabilities.index(confidence) == label))
    gaps = (
        len(bin_) * abs(sum(c for c, _ in bin_) / len(bin_) - sum(hit for _, hit in bin_) / len(bin_))
        for bin_ in members.values()
    )
    return sum(gaps) / len(labels)


@pytest.mark.parametrize("low", [False, True])
def test_what_a_test_reports(low: bool) -> None:
    labels = torch.arange(5).repeat(30)[:137]
    logits = torch.randn(137, 5) + torch.nn.functional.one_hot(labels, 5)
    if low:  # all of them could be probabilities, and are not
        logits = logits.sigmoid()
    collection = metrics.test_metrics(5)
    for batch, part in zip(logits.split(32), labels.split(32), strict=True):
        collection.update(batch, part)
    values = {name: value.item() for name, value in collection.compute().items()}
    true, predicted = labels.numpy(), logits.argmax(dim=1).numpy()
    assert values == {
        "test/accuracy": pytest.approx(accuracy_score(true, predicted)),
        "test/mean_class_accuracy": pytest.approx(balanced_accuracy_score(true, predicted)),
        "test/macro_f1": pytest.approx(f1_score(true, predicted, average="macro")),
        "test/calibration_error": pytest.approx(calibration_error(logits, labels), abs=1e-6),
    }


def test_unbalanced_classes_tell_the_accuracies_apart() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    collection = metrics.test_metrics(2)
    collection.update(torch.tensor([[2.0, 1.0]]).repeat(100, 1), labels)
    values = collection.compute()
    assert values["test/accuracy"] == pytest.approx(0.9)
    assert values["test/mean_class_accuracy"] == pytest.approx(0.5)
    assert values["test/macro_f1"] == pytest.approx((2 * 90 / 190) / 2)


def test_calibration_of_logits_between_zero_and_one() -> None:
    metric = CalibrationError(2, n_bins=15)
    metric.update(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))
    assert metric.compute().item() == pytest.approx(1 - 1 / (1 + np.exp(-0.8)), abs=1e-6)


def probed(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(3, (count,))
    return torch.randn(count, 5) + 1.2 * torch.nn.functional.one_hot(labels, 5), labels


def test_probe_accuracy() -> None:
    (bank, bank_labels), (images, labels) = probed(90), probed(60)
    metric = ProbeAccuracy(3, neighbours=7)
    for features, truth, part in ((bank, bank_labels, "bank"), (images, labels, "evaluated")):
        for some in torch.arange(len(features)).split(32):
            metric.update(features[some], truth[some], part)  # type: ignore[arg-type]
    weight, bias = linear_probe(bank, bank_labels, 3)
    linear = (images.double() @ weight.T + bias).argmax(dim=1)
    nearest = nearest_neighbour_scores(images, bank, bank_labels, 3, neighbours=7).argmax(dim=1)
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == {
        "linear_probe_accuracy": pytest.approx(accuracy_score(labels, linear)),
        "knn_accuracy": pytest.approx(accuracy_score(labels, nearest)),
    }
    assert len(set(values.values())) == 2
    assert values["knn_accuracy"] != accuracy_score(
        labels, nearest_neighbour_scores(images, bank, bank_labels, 3).argmax(1)
    )
    assert all(0.4 < value < 0.95 for value in values.values())


def test_probe_accuracy_of_two_processes() -> None:
    """The processes' images are put together, however many each has."""
    parts = {"bank": probed(41), "evaluated": probed(23)}
    whole, first, second = (ProbeAccuracy(3, neighbours=7) for _ in range(3))
    for part, (features, labels) in parts.items():
        whole.update(features, labels, part)  # type: ignore[arg-type]
        first.update(features[::2], labels[::2], part)  # type: ignore[arg-type]
        second.update(features[1::2], labels[1::2], part)  # type: ignore[arg-type]
    for name, reduction in first._reductions.items():
        setattr(first, name, reduction([*getattr(first, name), *getattr(second, name)]))
    first._computed = None
    for name, value in whole.compute().items():
        assert first.compute()[name] == pytest.approx(value.item())
