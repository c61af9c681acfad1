"""The domain-adversarial loss against independent computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract import toy_accuracy

from framework.errors import ConfigurationError
from framework.modules import DANN
from framework.modules.adaptation.dann import DomainAdversarialLoss
from framework.networks import NetworkOutputs


def outputs(count: int, shift: float = 0.0) -> NetworkOutputs:
    features = (torch.randn(count, 6, dtype=torch.float64) + shift).requires_grad_()
    return NetworkOutputs(features, torch.zeros(count, 3, dtype=torch.float64))


def loss(**options: Any) -> DomainAdversarialLoss:
    return DomainAdversarialLoss(6, hidden_features=8, normalization="none", **options).double()


@pytest.mark.parametrize(("weighting", "factor"), [("sum", 1.0), ("mean", 0.5)])
def test_value_against_a_loop(weighting: Any, factor: float) -> None:
    alignment, source, target = loss(domain_weighting=weighting), outputs(5), outputs(9, 1.0)
    total = 0.0
    for domain, label in ((source, 1), (target, 0)):
        losses = []
        for row in domain.features:
            probability = 1 / (1 + math.exp(-float(alignment.discriminator(row[None]))))
            losses.append(-math.log(probability if label == 1 else 1 - probability))
        total += sum(losses) / len(losses)
    value = alignment(source, target, torch.tensor(0.5))
    assert float(value) == pytest.approx(factor * total, rel=1e-6)


def test_features_get_minus_the_coefficient_times_the_discriminators_gradient() -> None:
    alignment, source, target, progress = loss(), outputs(5), outputs(5, 1.0), torch.tensor(0.3)
    coefficient = 2 / (1 + math.exp(-10 * 0.3)) - 1
    reversed_gradient = torch.autograd.grad(alignment(source, target, progress), source.features)[0]
    plain = torch.nn.functional.softplus(-alignment.discriminator(source.features)).mean()
    torch.testing.assert_close(
        reversed_gradient, -coefficient * torch.autograd.grad(plain, source.features)[0], rtol=1e-5, atol=1e-8
    )


def test_discriminator_gets_the_plain_gradient() -> None:
    alignment, source, target = loss(), outputs(5), outputs(5, 1.0)
    weight = alignment.discriminator[0].weight
    first = torch.autograd.grad(alignment(source, target, torch.tensor(0.0)), weight)[0]
    second = torch.autograd.grad(alignment(source, target, torch.tensor(0.9)), weight)[0]
    torch.testing.assert_close(first, second)
    assert first.abs().max() > 0


def test_no_adaptation_at_the_start() -> None:
    alignment, source, target = loss(), outputs(5), outputs(5, 1.0)
    gradient = torch.autograd.grad(alignment(source, target, torch.tensor(0.0)), source.features)[0]
    assert gradient.abs().max() == 0


def test_diagnostics() -> None:
    alignment, source, target = loss(), outputs(50), outputs(50, 4.0)
    optimizer = torch.optim.Adam(alignment.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        alignment(source, target, torch.tensor(0.5)).backward()
        optimizer.step()
    assert alignment.diagnostics["domain_accuracy"] > 0.98
    assert alignment.diagnostics["domain_loss"] < 0.1
    assert float(alignment.diagnostics["reversal_coefficient"]) == pytest.approx(0.9866, abs=1e-4)


def test_the_default_discriminator_can_tell_domains_apart() -> None:
    """skada's default ends in a softmax over one output: constant, and without a gradient for the features."""
    module = DANN(3, backbone="resnet8", bottleneck_features=6)
    source, target = outputs(32), outputs(32, 3.0)
    source, target = (NetworkOutputs(o.features.float().detach().requires_grad_(), o.logits) for o in (source, target))
    value = module.alignment(source, target, torch.tensor(0.5))
    assert 0.2 < float(value) < 3  # 2 log 2 where it guesses
    gradient = torch.autograd.grad(value, source.features)[0]
    assert gradient.abs().max() > 1e-5


def test_bad_values_name_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.domain_weighting"):
        DANN(3, backbone="resnet8", domain_weighting="half")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"--model\.reversal_gamma"):
        DANN(3, backbone="resnet8", reversal_gamma=-1.0)


def test_it_helps_on_a_toy() -> None:
    source_only = [toy_accuracy(None, "rotation", seed=seed) for seed in range(3)]
    losses = [DomainAdversarialLoss(16, hidden_features=256, normalization="none") for _ in range(3)]
    adapted = [toy_accuracy(loss, "rotation", seed=seed) for seed, loss in enumerate(losses)]
    assert sum(source_only) / 3 < 0.93
    assert min(adapted) > 0.95
