"""The domain-adversarial loss against independent computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
            probability = 1 / (1 + math.exp(-alignment.discriminator(row[None]).item()))
            losses.append(-math.log(probability if label == 1 else 1 - probability))
        total += sum(losses) / len(losses)
    value = alignment(source, target, torch.tensor(0.5))
    assert float(value) == pytest.approx(factor * total, rel=1e-6)


@pytest.mark.parametrize("weighting", ["sum", "mean"])
def test_one_loss_for_batches_of_any_size(weighting: Any) -> None:
    """What it keeps of a batch serves the next one only where that is alike; an evaluation's serves training."""
    alignment, progress = loss(domain_weighting=weighting), torch.tensor(0.5)
    for source_count, target_count in ((5, 9), (5, 9), (9, 5), (7, 7), (7, 8)):
        source, target = outputs(source_count), outputs(target_count, 1.0)
        with torch.inference_mode():
            evaluated = alignment(source, target, progress)
        value = alignment(source, target, progress)
        value.backward()
        logits = [alignment.discriminator(domain.features) for domain in (source, target)]
        means = [F.softplus(-logits[0]).mean(), F.softplus(logits[1]).mean()]
        expected = sum(means) if weighting == "sum" else sum(means) / 2
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(evaluated, expected)
        right = [float((logits[0] > 0).double().mean()), float((logits[1] < 0).double().mean())]
        assert float(alignment.diagnostics["domain_accuracy"]) == pytest.approx(sum(right) / 2)
        assert float(alignment.diagnostics["domain_loss"]) == pytest.approx(float(sum(means)) / 2)


def test_features_get_minus_the_coefficient_times_the_discriminators_gradient() -> None:
    alignment, source, target, progress = loss(), outputs(5), outputs(5, 1.0), torch.tensor(0.3)
    coefficient = 2 / (1 + math.exp(-10 * 0.3)) - 1
    reversed_gradient = torch.autograd.grad(alignment(source, target, progress), source.features)[0]
    plain = F.softplus(-alignment.discriminator(source.features)).mean()
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


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("domain_weighting", "half"),
        ("discriminator_features", 0),
        ("discriminator_normalization", "layer"),
        ("source_label", 2),
        ("reversal_schedule", "cosine"),
        ("reversal_gamma", -1.0),
        ("reversal_maximum", -1.0),
    ],
)
def test_bad_values_name_the_flag(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"--model\.{option}"):
        DANN(3, backbone="resnet8", **{option: value})


# ---------------------------------------------------------------------- label convention
def test_the_other_label_convention_is_the_mirror_image() -> None:
    """A discriminator whose last layer has the other sign, trained with the other labels, is its mirror for ever."""
    torch.manual_seed(0)
    first, second = loss(source_label=1), loss(source_label=0)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for parameter in second.discriminator[-1].parameters():
            parameter.neg_()
    optimizers = [torch.optim.SGD(alignment.parameters(), lr=0.5, momentum=0.9) for alignment in (first, second)]
    for _ in range(5):
        source, target, progress = outputs(5), outputs(9, 1.0), torch.tensor(0.3)
        gradients = []
        for alignment, optimizer in zip((first, second), optimizers, strict=True):
            optimizer.zero_grad()
            source.features.grad = target.features.grad = None
            alignment(source, target, progress).backward()
            optimizer.step()
            gradients.append((source.features.grad, target.features.grad))
        for left, right in zip(*gradients, strict=True):  # the features learn the same
            torch.testing.assert_close(left, right)
        for name, value in first.diagnostics.items():
            torch.testing.assert_close(second.diagnostics[name], value)
    names = dict(first.discriminator.named_parameters())
    for (name, left), right in zip(names.items(), second.discriminator.parameters(), strict=True):
        torch.testing.assert_close(-left if name.startswith("4") else left, right)


def test_label_1_is_the_source_by_default() -> None:
    alignment = loss()
    with torch.no_grad():
        for parameter in alignment.discriminator[-1].parameters():
            parameter.zero_()
        alignment.discriminator[-1].bias.fill_(3.0)  # it says "label 1" to everything
    alignment(outputs(5), outputs(9), torch.tensor(0.5))
    assert alignment.diagnostics["domain_accuracy"] == 0.5
    target_says_source = alignment(outputs(5), outputs(9), torch.tensor(0.5)).item()
    assert target_says_source == pytest.approx(math.log1p(math.exp(-3)) + math.log1p(math.exp(3)))


# ---------------------------------------------------------------------- schedules and discriminators
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("sigmoid", [0.0, 2 / (1 + math.exp(-2.5)) - 1, 0.99991]), ("linear", [0.0, 0.25, 1.0]), ("constant", [1.0] * 3)],
)
def test_reversal_schedules(schedule: Any, expected: list[float]) -> None:
    alignment, source, target = loss(reversal_schedule=schedule, reversal_maximum=0.3), outputs(5), outputs(5)
    reference = loss(reversal_schedule="constant")
    reference.load_state_dict(alignment.state_dict())
    plain = torch.autograd.grad(reference(source, target, torch.tensor(0.0)), source.features)[0]
    for progress, coefficient in zip([0.0, 0.25, 1.0], expected, strict=True):
        value = alignment(source, target, torch.tensor(progress))
        assert float(alignment.diagnostics["reversal_coefficient"]) == pytest.approx(0.3 * coefficient, abs=1e-5)
        gradient = torch.autograd.grad(value, source.features)[0]
        torch.testing.assert_close(gradient, 0.3 * coefficient * plain, rtol=1e-4, atol=1e-9)


def test_dropout_discriminator_draws_in_training_only() -> None:
    alignment = DomainAdversarialLoss(6, hidden_features=8, normalization="dropout").double()
    source, target, progress = outputs(5), outputs(5), torch.tensor(0.5)
    assert alignment(source, target, progress) != alignment(source, target, progress)
    alignment.eval()
    assert alignment(source, target, progress) == alignment(source, target, progress)


def test_order_of_images_does_not_matter() -> None:
    alignment, source, target = loss(), outputs(6), outputs(4, 1.0)
    mixed = NetworkOutputs(source.features[torch.randperm(6)], source.logits)
    torch.testing.assert_close(
        alignment(mixed, target, torch.tensor(0.5)), alignment(source, target, torch.tensor(0.5))
    )


# ---------------------------------------------------------------------- complaints
def complaints(progress: float = 0.3, **means: float) -> list[tuple[str, str]]:
    return list(loss().complaints({f"train/{name}": value for name, value in means.items()}, progress))


def test_complains_about_a_saturated_discriminator() -> None:
    ((key, sentence),) = complaints(domain_accuracy=0.996, reversal_coefficient=0.9)
    assert key == "saturated"
    assert "99.6%" in sentence
    for words in (
        "`train/domain_accuracy`",
        "`--model.trade_off`",
        "`--model.reversal_maximum`",
        "`--model.discriminator_normalization dropout`",
        "`--model.discriminator_features`",
    ):
        assert words in sentence


def test_does_not_complain_about_a_healthy_one_nor_before_it_is_time() -> None:
    assert not complaints(domain_accuracy=0.98, reversal_coefficient=0.9)
    assert not complaints(progress=0.1, domain_accuracy=1.0, reversal_coefficient=0.9)
    assert not complaints(domain_accuracy=1.0, reversal_coefficient=0.05)
    assert not complaints()


def test_it_helps_on_a_toy() -> None:
    source_only = [toy_accuracy(None, "rotation", seed=seed) for seed in range(3)]
    losses = [DomainAdversarialLoss(16, hidden_features=256, normalization="none") for _ in range(3)]
    adapted = [toy_accuracy(loss, "rotation", seed=seed) for seed, loss in enumerate(losses)]
    assert sum(source_only) / 3 < 0.93
    assert min(adapted) > 0.95
