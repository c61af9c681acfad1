"""Minimum class confusion: its value, its gradient, what minimising it does."""

from __future__ import annotations

import math

import pytest
import torch
from contract import toy_accuracy
from torch import Tensor

from framework.errors import ConfigurationError
from framework.modules import MCC
from framework.modules.adaptation.mcc import MinimumClassConfusionLoss
from framework.networks import NetworkOutputs

PROGRESS = torch.tensor(0.0)


def outputs(logits: Tensor) -> NetworkOutputs:
    return NetworkOutputs(torch.zeros(len(logits), 2, dtype=logits.dtype), logits)


SOURCE = outputs(torch.randn(4, 3, dtype=torch.float64))


def test_value_by_hand() -> None:
    # two images, P = [[.5, .5], [.25, .75]] at temperature 2; with w1, w2 the rows are their weighted means
    logits = 2 * torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64).log()
    certainties = [1 + 0.5, 1 + math.exp(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]  # 1 + exp(-entropy)
    w1, w2 = (2 * certainty / sum(certainties) for certainty in certainties)
    mixed = w1 * 0.25 + w2 * 0.1875
    expected = (mixed / (w1 * 0.5 + w2 * 0.25) + mixed / (w1 * 0.5 + w2 * 0.75)) / 2
    loss = MinimumClassConfusionLoss(temperature=2.0)
    assert float(loss(SOURCE, outputs(logits), PROGRESS)) == pytest.approx(expected)
    assert float(loss.diagnostics["class_confusion"]) == pytest.approx(expected)
    plain = logits.softmax(1)  # without the temperature
    assert float(loss.diagnostics["target_entropy"]) == pytest.approx(float(-(plain * plain.log()).sum(1).mean()))


def test_largest_for_uniform_and_zero_for_certain_predictions() -> None:
    loss = MinimumClassConfusionLoss()
    assert float(loss(SOURCE, outputs(torch.zeros(6, 4)), PROGRESS)) == pytest.approx(3 / 4)
    assert float(loss(SOURCE, outputs(1000 * torch.eye(4)), PROGRESS)) == pytest.approx(0, abs=1e-6)


def test_gradient_of_the_target_alone() -> None:
    """With the weights as they are at the point: no gradient flows through them, so plain differences would differ."""
    source = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    value = MinimumClassConfusionLoss()(outputs(source), outputs(target), PROGRESS)
    mine, none = torch.autograd.grad(value, [target, source], allow_unused=True)
    assert none is None
    scaled = target.detach() / 2.5
    certainty = 1 + (scaled.softmax(1) * scaled.log_softmax(1)).sum(1).exp()
    weights = certainty / certainty.mean()

    def with_fixed_weights(logits: Tensor) -> Tensor:
        probabilities = (logits / 2.5).softmax(1)
        confusion = torch.einsum("ij,i,ik->jk", probabilities, weights, probabilities)
        return (1 - confusion.diagonal() / confusion.sum(1)).mean()

    assert torch.autograd.gradcheck(with_fixed_weights, target)
    torch.testing.assert_close(mine, torch.autograd.grad(with_fixed_weights(target), target)[0])


def test_order_of_images_does_not_matter() -> None:
    logits = torch.randn(8, 3, dtype=torch.float64)
    loss = MinimumClassConfusionLoss()
    first = loss(SOURCE, outputs(logits), PROGRESS)
    torch.testing.assert_close(loss(SOURCE, outputs(logits[torch.randperm(8)]), PROGRESS), first)


def test_bad_values_name_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.temperature"):
        MCC(3, backbone="resnet8", temperature=0.0)


@pytest.mark.parametrize(("shift", "gain"), [("noise", 0.08), ("rotation", 0.05)])
def test_it_helps_on_a_toy(shift: str, gain: float) -> None:
    source_only = [toy_accuracy(None, shift, seed=seed) for seed in range(3)]
    adapted = [toy_accuracy(MinimumClassConfusionLoss(), shift, seed=seed) for seed in range(3)]
    assert sum(adapted) / 3 > sum(source_only) / 3 + gain
    assert all(after > before for before, after in zip(source_only, adapted, strict=True))
