"""The loss of DSAN: labels and predictions as weights, the ramp, and what it tells the user."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract import toy_accuracy

from framework.errors import ConfigurationError
from framework.functional import local_mmd
from framework.modules import DSAN
from framework.modules.adaptation.dsan import LocalMaximumMeanDiscrepancyLoss
from framework.networks import NetworkOutputs

END, EARLY = torch.tensor(1.0), torch.tensor(0.1)


def outputs(count: int, shift: float = 0.0) -> NetworkOutputs:
    features, logits = torch.randn(count, 6) + shift, torch.randn(count, 3)
    labels = None if shift else torch.arange(count) % 3
    return NetworkOutputs(features.requires_grad_(), logits.requires_grad_(), labels)


@pytest.mark.parametrize("classes", ["all", "shared"])
def test_value(classes: Any) -> None:
    source, target = outputs(8), outputs(6, 1.0)
    loss = LocalMaximumMeanDiscrepancyLoss(classes, (0.5, 1.0), ramp_gamma=0.0)
    probabilities = target.logits.softmax(1)
    assert source.labels is not None
    expected = local_mmd(source.features, target.features, source.labels, probabilities, classes, (0.5, 1.0))
    assert torch.equal(loss(source, target, EARLY), expected)
    assert torch.equal(loss.diagnostics["local_mmd"], expected)


def test_predictions_are_weights_and_do_not_learn() -> None:
    source, target = outputs(8), outputs(6, 1.0)
    gradients = torch.autograd.grad(
        LocalMaximumMeanDiscrepancyLoss()(source, target, END),
        [source.features, target.features, source.logits, target.logits],
        allow_unused=True,
    )
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[:2])
    assert gradients[2:] == (None, None)


def test_the_ramp_reaches_1() -> None:
    """DeepDA's, with gamma 1, ends at 0.46."""
    source, target = outputs(8), outputs(6, 1.0)
    loss = LocalMaximumMeanDiscrepancyLoss()
    whole = float(LocalMaximumMeanDiscrepancyLoss(ramp_gamma=0.0)(source, target, EARLY).detach())
    for progress in (0.0, 0.1, 1.0):
        weight = 2 / (1 + math.exp(-10 * progress)) - 1
        assert float(loss(source, target, torch.tensor(progress)).detach()) == pytest.approx(weight * whole, rel=1e-5)
        assert float(loss.diagnostics["ramp"]) == pytest.approx(weight)
    assert float(loss.diagnostics["ramp"]) > 0.999


def test_shared_classes() -> None:
    source, loss = outputs(8), LocalMaximumMeanDiscrepancyLoss("shared")
    for predicted, share in (([0] * 6, 1 / 3), ([0, 2] * 3, 2 / 3), ([0, 1, 2] * 2, 1)):
        target = outputs(6, 1.0)._replace(logits=9 * torch.eye(3)[predicted])
        loss(source, target, END)
        assert float(loss.diagnostics["shared_classes"]) == pytest.approx(share)
    nothing = source._replace(labels=torch.ones(8, dtype=torch.long))
    assert loss(nothing, outputs(6, 1.0)._replace(logits=9 * torch.eye(3)[[0] * 6]), END) == 0
    assert loss.diagnostics["shared_classes"] == 0


def test_complains_where_classes_hardly_meet() -> None:
    loss = LocalMaximumMeanDiscrepancyLoss()
    assert not list(loss.complaints({"train/shared_classes": 0.1}, 0.1))
    assert not list(loss.complaints({"train/shared_classes": 0.6}, 0.5))
    assert not list(loss.complaints({}, 0.5))
    ((_, sentence),) = loss.complaints({"train/shared_classes": 0.1}, 0.5)
    assert "10%" in sentence
    assert "--data.target_batch_size" in sentence
    assert "--model.trade_off" in sentence


def test_bad_values_name_the_flag() -> None:
    for option, value in (("classes", "some"), ("kernel_scales", ()), ("ramp_gamma", -1.0)):
        with pytest.raises(ConfigurationError, match=rf"--model\.{option}"):
            DSAN(3, backbone="resnet8", **{option: value})
    with pytest.raises(ConfigurationError, match=r"`source\.labels`"):
        LocalMaximumMeanDiscrepancyLoss()(outputs(4, 1.0), outputs(4, 1.0), END)


@pytest.mark.parametrize(("shift", "classes"), [("noise", "all"), ("noise", "shared"), ("rotation", "shared")])
def test_it_helps_on_a_toy(shift: str, classes: Any) -> None:
    source_only = [toy_accuracy(None, shift, seed=seed) for seed in range(2)]
    adapted = [toy_accuracy(LocalMaximumMeanDiscrepancyLoss(classes), shift, seed=seed) for seed in range(2)]
    assert sum(source_only) / 2 < 0.93
    assert min(adapted) > 0.95
