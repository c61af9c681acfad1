"""The transport's cost against loops, and what moves by it."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from contract import toy_accuracy

from framework.errors import ConfigurationError
from framework.functional import exact_coupling, sinkhorn_coupling
from framework.modules import DeepJDOT
from framework.modules.adaptation.deep_jdot import JointDistributionOptimalTransportLoss
from framework.networks import NetworkOutputs

ZERO = torch.tensor(0.0)
needs_pot = pytest.mark.skipif(importlib.util.find_spec("ot") is None, reason="needs the extra `transport`")
each_transport = pytest.mark.parametrize("transport", ["sinkhorn", pytest.param("exact", marks=needs_pot)])


def outputs(count: int, labelled: bool) -> NetworkOutputs:
    features = torch.randn(count, 4, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
    return NetworkOutputs(features, logits, torch.arange(count) % 3 if labelled else None)


def cost_by_loop(source: NetworkOutputs, target: NetworkOutputs, alpha: float, weight: float) -> torch.Tensor:
    assert source.labels is not None
    rows = []
    for features, label in zip(source.features.tolist(), source.labels.tolist(), strict=True):
        row = []
        for others, logits in zip(target.features.tolist(), target.logits.tolist(), strict=True):
            distance = sum((a - b) ** 2 for a, b in zip(features, others, strict=True))
            probability = math.exp(logits[label]) / sum(math.exp(value) for value in logits)
            row.append(alpha * distance - weight * math.log(probability))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@each_transport
@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 7)])
def test_value_against_a_loop(n: int, m: int, transport: Any) -> None:
    source, target = outputs(n, True), outputs(m, False)
    loss = JointDistributionOptimalTransportLoss(feature_weight=0.3, label_weight=0.7, transport=transport)
    cost = cost_by_loop(source, target, 0.3, 0.7)
    coupling = exact_coupling(cost) if transport == "exact" else sinkhorn_coupling(cost, 0.05, 50)
    expected = sum(float(coupling[i, j] * cost[i, j]) for i in range(n) for j in range(m))
    assert float(loss(source, target, ZERO).detach()) == pytest.approx(expected, rel=1e-8)
    parts = loss.diagnostics
    assert 0.3 * float(parts["feature_cost"]) + 0.7 * float(parts["label_cost"]) == pytest.approx(expected, rel=1e-8)


def test_gradient_is_the_cost_s_under_a_fixed_coupling() -> None:
    source, target = outputs(4, True), outputs(5, False)
    loss = JointDistributionOptimalTransportLoss(feature_weight=0.3, label_weight=0.7)
    inputs = [source.features, target.features, target.logits]
    gradients = torch.autograd.grad(loss(source, target, ZERO), inputs)
    coupling = sinkhorn_coupling(cost_by_loop(source, target, 0.3, 0.7))
    # in closed form: 2 alpha sum_j coupling_ij (s_i - t_j), and lambda sum_i coupling_ij (p_j - onehot_i)
    difference = (source.features[:, None] - target.features[None]).detach()
    weighted = 0.6 * coupling[:, :, None] * difference
    torch.testing.assert_close(gradients[0], weighted.sum(1))
    torch.testing.assert_close(gradients[1], -weighted.sum(0))
    assert source.labels is not None
    excess = target.logits.detach().softmax(1)[None] - torch.eye(3, dtype=torch.float64)[source.labels][:, None]
    torch.testing.assert_close(gradients[2], 0.7 * (coupling[:, :, None] * excess).sum(0))


def test_gradcheck_where_the_coupling_does_not_change() -> None:
    loss = JointDistributionOptimalTransportLoss(feature_weight=1.0, label_weight=0.1, transport="sinkhorn")
    loss._coupling = lambda cost: torch.full_like(cost, 1 / cost.numel())  # type: ignore[method-assign]
    source, target = outputs(3, True), outputs(4, False)

    def function(features: torch.Tensor, others: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return loss(source._replace(features=features), NetworkOutputs(others, logits), ZERO)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, (source.features, target.features, target.logits))


@each_transport
def test_order_within_a_domain_plays_no_part(transport: Any) -> None:
    source, target = outputs(5, True), outputs(6, False)
    loss = JointDistributionOptimalTransportLoss(feature_weight=0.3, label_weight=0.7, transport=transport)
    value = loss(source, target, ZERO)
    order = torch.randperm(6)
    torch.testing.assert_close(
        loss(source, NetworkOutputs(target.features[order], target.logits[order]), ZERO), value, rtol=1e-9, atol=0
    )


@each_transport
def test_the_coupling_respects_labels(transport: Any) -> None:
    """Of two target images as near, the one with the right prediction is taken."""
    source = NetworkOutputs(torch.zeros(2, 3), torch.zeros(2, 2), torch.tensor([0, 1]))
    target = NetworkOutputs(torch.ones(2, 3), torch.tensor([[-4.0, 4.0], [4.0, -4.0]]))
    loss = JointDistributionOptimalTransportLoss(feature_weight=1.0, label_weight=1.0, transport=transport)
    loss(source, target, ZERO)
    assert float(loss.diagnostics["transport_agreement"]) == pytest.approx(1.0, abs=1e-3)
    assert float(loss.diagnostics["coupling_spread"]) == pytest.approx(0.0, abs=0.02)
    loss = JointDistributionOptimalTransportLoss(feature_weight=1.0, label_weight=0.0, transport="sinkhorn")
    loss(source, target, ZERO)  # without the labels all costs are equal
    assert float(loss.diagnostics["transport_agreement"]) == pytest.approx(0.5)
    assert float(loss.diagnostics["coupling_spread"]) == pytest.approx(1.0)


def test_complaint() -> None:
    loss = JointDistributionOptimalTransportLoss()
    ((key, sentence),) = loss.complaints({"train/coupling_spread": 0.98}, 0.3)
    assert key == "coupling"
    assert "0.98" in sentence
    assert "--model.entropic_regularization" in sentence
    assert not list(loss.complaints({"train/coupling_spread": 0.5}, 0.3))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"feature_weight": -1.0}, "feature_weight"),
        ({"label_weight": -1.0}, "label_weight"),
        ({"feature_weight": 0.0, "label_weight": 0.0}, "feature_weight"),
        ({"transport": "emd"}, "transport"),
        ({"entropic_regularization": 0.0}, "entropic_regularization"),
        ({"iterations": 0}, "iterations"),
    ],
)
def test_bad_values_name_the_flag(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"--model\.{flag}"):
        DeepJDOT(3, backbone="resnet8", **options)


def test_exact_without_pot_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'transfer-framework\[transport\]'"):
        JointDistributionOptimalTransportLoss(transport="exact")


def test_source_without_labels_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`labels`"):
        JointDistributionOptimalTransportLoss()(outputs(4, False), outputs(4, False), ZERO)


@each_transport
def test_it_helps_on_a_toy(transport: Any) -> None:
    def loss() -> JointDistributionOptimalTransportLoss:
        return JointDistributionOptimalTransportLoss(
            feature_weight=0.1, label_weight=0.1, transport=transport, iterations=20
        )

    source_only = [toy_accuracy(None, "rotation", seed=seed, steps=100) for seed in (1, 2)]
    adapted = [toy_accuracy(loss(), "rotation", seed=seed, steps=100) for seed in (1, 2)]
    assert max(source_only) < 0.93
    assert min(adapted) > 0.98
