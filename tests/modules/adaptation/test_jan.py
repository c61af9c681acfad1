"""The loss of JAN: its layers, its ramp, and the adversary of JAN-A."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import build_data, toy_accuracy

from framework.errors import ConfigurationError
from framework.functional import joint_mmd
from framework.modules import JAN
from framework.modules.adaptation.jan import JointMaximumMeanDiscrepancyLoss
from framework.networks import NetworkOutputs
from framework.trainer import Trainer

END, EARLY = torch.tensor(1.0), torch.tensor(0.1)


def outputs(count: int, shift: float = 0.0) -> NetworkOutputs:
    features = torch.randn(count, 6, dtype=torch.float64) + shift
    logits = torch.randn(count, 3, dtype=torch.float64) + shift * torch.arange(3)
    return NetworkOutputs(features.requires_grad_(), logits.requires_grad_())


def loss(**options: Any) -> JointMaximumMeanDiscrepancyLoss:
    return JointMaximumMeanDiscrepancyLoss(6, 3, **options).double()


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("estimator", ["biased", "unbiased", "linear_time"])
def test_value_is_the_joint_mmd_of_features_and_probabilities(estimator: Any, adversarial: bool) -> None:
    source, target = outputs(8), outputs(8, 1.0)
    alignment = loss(estimator=estimator, kernel_scales=(0.5, 1.0), ramp_gamma=0.0, adversarial=adversarial)
    layers = [[o.features, o.logits.softmax(1)] for o in (source, target)]
    expected = joint_mmd(*layers, estimator, scales=((0.5, 1.0), (1.0,)), bandwidths=(None, 0.92**2))
    torch.testing.assert_close(alignment(source, target, EARLY), expected)  # the adversary starts as the identity
    torch.testing.assert_close(alignment.diagnostics["joint_mmd"], expected)


def test_predictions_learn_too() -> None:
    source, target = outputs(8), outputs(8, 1.0)
    for gradient in torch.autograd.grad(loss()(source, target, END), [source.logits, target.logits]):
        assert gradient.abs().max() > 1e-5


def test_ramp() -> None:
    source, target = outputs(8), outputs(8, 1.0)
    alignment = loss()
    whole = loss(ramp_gamma=0.0)(source, target, EARLY)
    weight = 2 / (1 + math.exp(-10 * 0.1)) - 1
    torch.testing.assert_close(alignment(source, target, EARLY).item(), weight * whole.item(), rtol=1e-6, atol=0)
    assert float(alignment.diagnostics["ramp"]) == pytest.approx(weight)
    assert float(alignment.diagnostics["joint_mmd"]) == pytest.approx(whole.item())  # without the weight
    assert alignment(source, target, torch.tensor(0.0)) == 0


def test_the_adversary_raises_what_the_network_lowers() -> None:
    source, target = outputs(8), outputs(8, 1.0)
    alignment = loss(adversarial=True)
    for matrix in alignment.maps:
        matrix.data += 0.1 * torch.randn_like(matrix)
    inputs = [source.features, source.logits, target.features, target.logits]
    found = torch.autograd.grad(alignment(source, target, END), [*inputs, *alignment.maps])

    maps = [matrix.detach().clone().requires_grad_() for matrix in alignment.maps]
    layers = [[o.features @ maps[0].T, o.logits.softmax(1) @ maps[1].T] for o in (source, target)]
    ramp = 2 / (1 + math.exp(-10)) - 1
    plain = torch.autograd.grad(ramp * joint_mmd(*layers), [*inputs, *maps])
    for gradient, expected in zip(found[:4], plain[:4], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)
    for gradient, expected in zip(found[4:], plain[4:], strict=True):
        torch.testing.assert_close(gradient, -expected, rtol=1e-5, atol=1e-9)
        assert gradient.abs().max() > 0


def test_the_adversary_is_learned_saved_and_measured() -> None:
    assert not list(loss().parameters())
    module = JAN(3, backbone="resnet8", bottleneck_features=6, adversarial=True)
    assert [tuple(p.shape) for p in module.alignment.parameters()] == [(6, 6), (3, 3)]
    assert sum("alignment.maps" in name for name in module.state_dict()) == 2
    source, target = outputs(32), outputs(32, 0.3)
    alignment = loss(adversarial=True)
    optimizer = torch.optim.SGD(alignment.parameters(), lr=0.5)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        alignment(source, target, END).backward()
        values.append(float(alignment.diagnostics["joint_mmd"]))
        optimizer.step()
    assert values[-1] > 1.1 * values[0]
    moved = [(m - torch.eye(len(m))).square().sum() / len(m) for m in (p.detach() for p in alignment.maps)]
    alignment(source, target, END)
    assert float(alignment.diagnostics["adversary"]) == pytest.approx(math.sqrt(sum(moved) / 2))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["biased", "linear_time"])
def test_the_adversary_compiles_and_keeps_its_value_under_autocast(estimator: Any) -> None:
    torch._dynamo.reset()
    alignment = JointMaximumMeanDiscrepancyLoss(6, 3, estimator=estimator, adversarial=True)
    source, target = (
        NetworkOutputs(o.features.float().detach(), o.logits.float().detach()) for o in (outputs(8), outputs(8, 1.0))
    )
    expected = torch.autograd.grad(alignment(source, target, END), list(alignment.parameters()))
    compiled = torch.compile(alignment, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(compiled(source, target, END), list(alignment.parameters()))
    torch._dynamo.reset()
    for gradient, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)


def test_bad_values_name_the_flag() -> None:
    for option, value in (
        ("estimator", "quadratic"),
        ("kernel_scales", (1.0, -1.0)),
        ("probability_width", 0.0),
        ("ramp_gamma", -1.0),
    ):
        with pytest.raises(ConfigurationError, match=rf"--model\.{option}"):
            JAN(3, backbone="resnet8", **{option: value})


def test_linear_time_needs_equal_batches(domains: Path) -> None:
    module = JAN(3, backbone="resnet8", estimator="linear_time")
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"`--data\.target_batch_size` .*linear_time`, but got 3 and 4"):
        trainer.fit(module, build_data(domains, target_batch_size=3))


@pytest.mark.parametrize(("shift", "adversarial"), [("noise", False), ("rotation", False), ("rotation", True)])
def test_it_helps_on_a_toy(shift: str, adversarial: bool) -> None:
    source_only = [toy_accuracy(None, shift, seed=seed) for seed in range(2)]
    losses = [JointMaximumMeanDiscrepancyLoss(16, 2, adversarial=adversarial) for _ in range(2)]
    adapted = [toy_accuracy(loss, shift, seed=seed) for seed, loss in enumerate(losses)]
    assert sum(source_only) / 2 < 0.93
    assert min(adapted) > 0.95
