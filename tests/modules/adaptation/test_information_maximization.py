"""Information maximisation and, without its diversity, entropy minimisation."""

from __future__ import annotations

import math

import pytest
import torch
from contract import toy_accuracy
from torch import Tensor

from framework.errors import ConfigurationError
from framework.metrics import InformationMaximization as InformationMetric
from framework.modules import InformationMaximization
from framework.modules.adaptation.information_maximization import InformationMaximizationLoss
from framework.networks import NetworkOutputs

PROGRESS = torch.tensor(0.0)


def outputs(logits: Tensor) -> NetworkOutputs:
    return NetworkOutputs(torch.zeros(len(logits), 2, dtype=logits.dtype), logits)


SOURCE = outputs(torch.randn(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_value_against_a_loop(weight: float) -> None:
    logits = 2 * torch.randn(7, 3, dtype=torch.float64)
    mean, entropy = [0.0, 0.0, 0.0], 0.0
    for row in logits.tolist():
        total = sum(math.exp(z) for z in row)
        for k, z in enumerate(row):
            mean[k] += math.exp(z) / total / 7
            entropy -= math.exp(z) / total * math.log(math.exp(z) / total) / 7
    diversity = -sum(p * math.log(p) for p in mean)
    loss = InformationMaximizationLoss(weight)
    assert float(loss(SOURCE, outputs(logits), PROGRESS)) == pytest.approx(entropy - weight * diversity)
    assert float(loss.diagnostics["target_entropy"]) == pytest.approx(entropy)
    assert float(loss.diagnostics["target_mutual_information"]) == pytest.approx(diversity - entropy)


def test_it_is_minus_what_the_metric_measures() -> None:
    logits, metric = torch.randn(9, 4), InformationMetric(4)
    metric.update(logits)
    value = InformationMaximizationLoss()(SOURCE, outputs(logits), PROGRESS)
    torch.testing.assert_close(value, -metric.compute(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_gradient_of_the_target_alone(weight: float) -> None:
    loss = InformationMaximizationLoss(weight)
    target = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: loss(SOURCE, outputs(logits), PROGRESS), target)
    source = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(loss(outputs(source), outputs(target), PROGRESS), source, allow_unused=True) == (None,)


def test_certain_predictions_have_a_finite_gradient() -> None:
    logits = (1000 * torch.eye(3)).requires_grad_()
    value = InformationMaximizationLoss()(SOURCE, outputs(logits), PROGRESS)
    assert float(value.detach()) == pytest.approx(-math.log(3))
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_order_of_images_does_not_matter() -> None:
    logits, loss = torch.randn(8, 3, dtype=torch.float64), InformationMaximizationLoss()
    first = loss(SOURCE, outputs(logits), PROGRESS)
    torch.testing.assert_close(loss(SOURCE, outputs(logits[torch.randperm(8)]), PROGRESS), first)


def test_diversity_is_what_keeps_predictions_from_collapsing() -> None:
    start = 0.3 * torch.randn(30, 3) + torch.tensor([2.0, 0.0, 0.0])
    largest = {}
    for weight in (0.0, 1.0):
        logits = start.clone().requires_grad_()
        optimizer, loss = torch.optim.Adam([logits], lr=0.1), InformationMaximizationLoss(weight)
        for _ in range(150):
            optimizer.zero_grad()
            loss(SOURCE, outputs(logits), PROGRESS).backward()
            optimizer.step()
        assert loss.diagnostics["target_entropy"] < 0.1
        largest[weight] = float(logits.softmax(1).mean(0).max())
    assert largest[0.0] > 0.99
    assert largest[1.0] < 0.6


def test_bad_values_name_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.diversity_weight"):
        InformationMaximization(3, backbone="resnet8", diversity_weight=-1.0)


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize(("shift", "gain"), [("noise", 0.1), ("rotation", 0.05)])
def test_it_helps_on_a_toy(shift: str, gain: float, weight: float) -> None:
    source_only = [toy_accuracy(None, shift, seed=seed) for seed in range(3)]
    adapted = [toy_accuracy(InformationMaximizationLoss(weight), shift, seed=seed) for seed in range(3)]
    assert sum(adapted) / 3 > sum(source_only) / 3 + gain
    assert all(after > before for before, after in zip(source_only, adapted, strict=True))
