"""Batch spectral shrinkage: its term, and what minimising it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transfer_contract as contract

from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.modules import BSS
from framework.networks import NetworkOutputs

BATCH = LabelledBatch(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_value_against_numpy(count: int, shape: tuple[int, int]) -> None:
    features = torch.randn(shape, dtype=torch.float64)
    model = BSS(3, backbone="resnet8", singular_values=count)
    value = float(model.regularization(NetworkOutputs(features, features), BATCH))
    squares = np.linalg.svd(features.numpy(), compute_uv=False) ** 2
    assert value == pytest.approx(squares[-count:].sum(), rel=1e-10)
    assert float(model.diagnostics["spectral_share"]) == pytest.approx(squares[-count:].sum() / squares.sum())


def test_defaults_are_the_papers() -> None:
    model = BSS(3, backbone="resnet8")
    assert (model.trade_off, model.singular_values) == (0.001, 1)


def test_gradient_and_autocast() -> None:
    model = BSS(3, backbone="resnet8", singular_values=2)
    features = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model.regularization(NetworkOutputs(x, x), BATCH), features)
    half = torch.randn(5, 8).bfloat16()
    expected = model.regularization(NetworkOutputs(half.float(), half.float()), BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        value = model.regularization(NetworkOutputs(half, half), BATCH)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_features_of_rank_one_have_a_finite_gradient() -> None:
    for features in (torch.zeros(4, 6), torch.ones(4, 6)):
        features.requires_grad_()
        value = BSS(3, backbone="resnet8").regularization(NetworkOutputs(features, features), BATCH)
        assert torch.autograd.grad(value, features)[0].isfinite().all()


def test_minimising_it_takes_the_small_ones_alone() -> None:
    start = torch.randn(8, 12, dtype=torch.float64)
    features = start.clone().requires_grad_()
    model = BSS(3, backbone="resnet8", singular_values=2)
    for _ in range(50):
        gradient = torch.autograd.grad(model.regularization(NetworkOutputs(features, features), BATCH), features)[0]
        features.data -= 0.2 * gradient
    before, after = (np.linalg.svd(x.detach().numpy(), compute_uv=False) for x in (start, features))
    np.testing.assert_allclose(after[:6], before[:6])
    np.testing.assert_allclose(after[6:], 0, atol=1e-6)


@pytest.mark.parametrize("options", [{"singular_values": 0}, {"trade_off": -1.0}])
def test_bad_values_name_the_flag(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"--model\.{next(iter(options))}"):
        BSS(3, backbone="resnet8", **options)


@pytest.mark.parametrize("options", [{"backbone": "resnet8"}, contract.SMALL_TRANSFORMER], ids=["resnet8", "vit"])
def test_the_backbone_learns_from_it(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for trade_off in (0.0, 1.0):
        torch.manual_seed(0)
        model = BSS(3, **options, trade_off=trade_off)
        monkeypatch.setattr(model, "log", lambda *_, **__: None)
        loss = model.training_step(LabelledBatch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])), 0)
        assert loss is not None
        gradients.append(torch.autograd.grad(loss, next(model.backbone.parameters()))[0])
    assert gradients[1].isfinite().all()
    assert not torch.equal(*gradients)
