"""The margin disparity discrepancy against independent computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract import toy_accuracy

from framework.errors import ConfigurationError
from framework.modules import MDD
from framework.modules.adaptation.mdd import MarginDisparityDiscrepancyLoss
from framework.networks import NetworkOutputs


def outputs(count: int, shift: float = 0.0) -> NetworkOutputs:
    features = (torch.randn(count, 6, dtype=torch.float64) + shift).requires_grad_()
    return NetworkOutputs(features, torch.randn(count, 3, dtype=torch.float64).requires_grad_())


def loss(**options: Any) -> MarginDisparityDiscrepancyLoss:
    return MarginDisparityDiscrepancyLoss(6, 3, classifier_features=8, **options).double().eval()


def plain(alignment: MarginDisparityDiscrepancyLoss, source: NetworkOutputs, target: NetworkOutputs) -> torch.Tensor:
    """gamma E_s[-log p_c] - E_t[log(1 - p_c)], row by row, without a reversal."""
    total = torch.zeros((), dtype=torch.float64)
    for domain, weight in ((source, alignment.margin), (target, 1.0)):
        for features, logits in zip(domain.features, domain.logits, strict=True):
            scores = logits.tolist()
            probability = torch.softmax(alignment.classifier(features), dim=0)[scores.index(max(scores))]
            term = -torch.log(probability) if domain is source else -torch.log(1 - probability)
            total = total + weight * term / len(domain.features)
    return total


@pytest.mark.parametrize("margin", [1.0, 4.0])
def test_value_against_a_loop(margin: float) -> None:
    alignment, source, target = loss(margin=margin), outputs(5), outputs(9, 1.0)
    value = alignment(source, target, torch.tensor(0.5))
    torch.testing.assert_close(value, plain(alignment, source, target), rtol=1e-10, atol=0)
    assert float(alignment.diagnostics["margin_disparity"]) == pytest.approx(-float(value.detach()))


def test_features_ascend_and_the_adversary_descends() -> None:
    alignment, source, target, progress = loss(), outputs(5), outputs(7, 1.0), torch.tensor(0.3, dtype=torch.float64)
    coefficient = 0.1 * (2 / (1 + math.exp(-10 * 0.3)) - 1)
    inputs = [source.features, target.features]
    weights = list(alignment.parameters())
    mine = torch.autograd.grad(alignment(source, target, progress), inputs + weights)
    expected = torch.autograd.grad(plain(alignment, source, target), inputs + weights)
    for gradient, reference in zip(mine[:2], expected[:2], strict=True):
        torch.testing.assert_close(gradient, -coefficient * reference, rtol=1e-9, atol=1e-12)
    for gradient, reference in zip(mine[2:], expected[2:], strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


def test_the_head_counts_by_its_predictions_only() -> None:
    alignment, source, target = loss(), outputs(5), outputs(7, 1.0)
    value = alignment(source, target, torch.tensor(0.3))
    assert torch.autograd.grad(value, source.logits, allow_unused=True, retain_graph=True) == (None,)
    sharper = alignment(source._replace(logits=9 * source.logits), target, torch.tensor(0.3))
    torch.testing.assert_close(sharper, value)


def test_gradcheck() -> None:
    # the reversal's gradient is not the function's: with it cut off, that of the adversary's weights is
    alignment, source, target = loss(), outputs(3), outputs(4, 1.0)

    def function(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        last = {"classifier.3.weight": weight, "classifier.3.bias": bias}
        value = torch.func.functional_call(alignment, last, (source, target, torch.tensor(0.3)))
        assert isinstance(value, torch.Tensor)
        return value

    last = alignment.classifier[3]
    assert torch.autograd.gradcheck(
        function, (last.weight.detach().requires_grad_(), last.bias.detach().requires_grad_())
    )


def test_order_within_a_domain_plays_no_part() -> None:
    alignment, source, target = loss(), outputs(5), outputs(7, 1.0)
    value = alignment(source, target, torch.tensor(0.3))
    order = torch.randperm(7)
    shuffled = NetworkOutputs(target.features[order], target.logits[order])
    torch.testing.assert_close(alignment(source, shuffled, torch.tensor(0.3)), value)


def test_a_certain_adversary_keeps_its_value_and_its_gradient() -> None:
    """TLlib clamps 1 - p + 1e-6: at p = 1 - 1e-9 it says 13.8 for 20.7, and the gradient is cut to a thousandth."""
    alignment = MarginDisparityDiscrepancyLoss(2, 2, classifier_features=0, margin=1.0)
    with torch.no_grad():
        alignment.classifier[0].weight.copy_(torch.eye(2))
        alignment.classifier[0].bias.zero_()
    for gap in (20.7, 200.0):
        source = NetworkOutputs(torch.tensor([[gap, 0.0]]), torch.tensor([[1.0, 0.0]]))
        features = torch.tensor([[gap, 0.0]], requires_grad=True)
        value = alignment(source, NetworkOutputs(features, torch.tensor([[1.0, 0.0]])), torch.tensor(1.0))
        assert float(value) == pytest.approx(gap, rel=1e-5)
        (gradient,) = torch.autograd.grad(value, features)
        assert gradient[0, 0].item() == pytest.approx(-0.1, rel=1e-3)


def test_equal_domains_settle_at_the_papers_equilibrium() -> None:
    """p[c] = margin / (1 + margin) where the features are distributed alike: there -a log p - log(1 - p) is least."""
    alignment = MarginDisparityDiscrepancyLoss(2, 3, classifier_features=16, classifier_dropout=0.0, margin=4.0)
    optimizer = torch.optim.Adam(alignment.parameters(), lr=0.02)
    classes = torch.arange(60) % 3
    features = torch.eye(3)[classes][:, :2] * 3
    domain = NetworkOutputs(features, torch.eye(3)[classes])
    for _ in range(200):
        optimizer.zero_grad()
        alignment(domain, domain, torch.tensor(0.0)).backward()
        optimizer.step()
    assert float(alignment.diagnostics["source_agreement"]) == pytest.approx(0.8, abs=0.02)
    assert float(alignment.diagnostics["target_agreement"]) == pytest.approx(0.8, abs=0.02)


def test_complaint() -> None:
    alignment = loss()
    means = {"train/source_agreement": 0.95, "train/target_agreement": 0.2}
    ((key, sentence),) = alignment.complaints(means, 0.6)
    assert key == "mdd"
    assert "0.20" in sentence
    assert "--model.reversal_maximum" in sentence
    assert not list(alignment.complaints(means, 0.1))
    assert not list(alignment.complaints({"train/source_agreement": 0.8, "train/target_agreement": 0.7}, 0.6))


@pytest.mark.parametrize(
    ("option", "value"),
    [("margin", 0.0), ("reversal_gamma", -1.0), ("reversal_maximum", -1.0), ("classifier_dropout", 1.0)],
)
def test_bad_values_name_the_flag(option: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"--model\.{option}"):
        MDD(3, backbone="resnet8", **{option: value})


def test_it_helps_on_a_toy() -> None:
    source_only = [toy_accuracy(None, "noise", seed=seed) for seed in range(3)]
    losses = [
        MarginDisparityDiscrepancyLoss(16, 2, classifier_features=256, classifier_dropout=0.0, reversal_maximum=0.2)
        for _ in range(3)
    ]
    adapted = [toy_accuracy(loss, "noise", seed=seed) for seed, loss in enumerate(losses)]
    assert max(source_only) < 0.8
    assert min(adapted) > 0.85
