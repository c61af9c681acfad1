"""Batch spectral penalisation: the penalty, and its sum with DANN's loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.modules import BSP, DANN
from framework.modules.adaptation.bsp import BatchSpectralPenalizationLoss
from framework.networks import NetworkOutputs

PROGRESS = torch.tensor(0.5)


def outputs(count: int, shift: float = 0.0) -> NetworkOutputs:
    features = (torch.randn(count, 6, dtype=torch.float64) + shift).requires_grad_()
    return NetworkOutputs(features, torch.zeros(count, 3, dtype=torch.float64))


def module(**options: Any) -> BSP:
    return BSP(3, backbone="resnet8", bottleneck_features=6, discriminator_normalization="none", **options).double()


@pytest.mark.parametrize("largest", [1, 2])
def test_penalty_against_the_eigenvalues_of_the_gram_matrix(largest: int) -> None:
    source, target = outputs(5), outputs(9, 1.0)
    loss, expected = BatchSpectralPenalizationLoss(largest), 0.0
    value = loss(source, target, PROGRESS)
    for name, domain in (("source", source), ("target", target)):
        rows = domain.features.detach().numpy()
        squares = np.linalg.eigvalsh(rows.T @ rows)[::-1]
        expected += squares[:largest].sum()
        share = float(loss.diagnostics[f"{name}_spectral_share"])
        assert share == pytest.approx(squares[:largest].sum() / squares.sum())
    assert float(value) == pytest.approx(expected)


def test_gradient_of_the_penalty() -> None:
    source, target, loss = outputs(5), outputs(9, 1.0), BatchSpectralPenalizationLoss()

    def of_features(first: Tensor, second: Tensor) -> Tensor:
        return loss(source._replace(features=first), target._replace(features=second), PROGRESS)

    assert torch.autograd.gradcheck(of_features, (source.features, target.features))


def test_features_of_zero_have_a_finite_gradient() -> None:
    source = NetworkOutputs(torch.zeros(4, 6, requires_grad=True), torch.zeros(4, 3))
    loss = BatchSpectralPenalizationLoss()
    assert torch.autograd.grad(loss(source, source, PROGRESS), source.features)[0].isfinite().all()
    assert loss.diagnostics["source_spectral_share"] == 0


def test_order_of_images_does_not_matter() -> None:
    source, target, loss = outputs(5), outputs(9), BatchSpectralPenalizationLoss()
    shuffled = target._replace(features=target.features[torch.randperm(9)])
    torch.testing.assert_close(loss(source, shuffled, PROGRESS), loss(source, target, PROGRESS))


def test_minimising_it_levels_the_largest_singular_value_alone() -> None:
    features = (torch.randn(20, 4) + torch.tensor([4.0, 0.0, 0.0, 0.0])).requires_grad_()
    loss, outputs = BatchSpectralPenalizationLoss(), NetworkOutputs(features, torch.zeros(20, 3))
    before = torch.linalg.svdvals(features.detach())
    optimizer = torch.optim.SGD([features], lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        loss(outputs, outputs, PROGRESS).backward()
        optimizer.step()
    after = torch.linalg.svdvals(features.detach())
    assert after[0] < 0.6 * before[0]
    torch.testing.assert_close(after[1:], before[1:].clamp(max=float(after[0])), rtol=0.02, atol=0)


def test_the_method_is_danns_loss_plus_the_weighted_penalty() -> None:
    whole = module(penalty_weight=0.01, domain_weighting="mean", reversal_gamma=5.0)
    alone = DANN(
        3,
        backbone="resnet8",
        bottleneck_features=6,
        discriminator_normalization="none",
        domain_weighting="mean",
        reversal_gamma=5.0,
    ).double()
    alone.alignment.load_state_dict(whole.alignment.alignment.state_dict())
    source, target, penalty = outputs(5), outputs(9, 1.0), BatchSpectralPenalizationLoss()
    value = whole.alignment(source, target, PROGRESS)
    expected = alone.alignment(source, target, PROGRESS) + 0.01 * penalty(source, target, PROGRESS)
    torch.testing.assert_close(value, expected)
    for features in (source.features, target.features):
        # DANN's part comes reversed, the penalty's does not
        mine = torch.autograd.grad(value, features, retain_graph=True)[0]
        torch.testing.assert_close(mine, torch.autograd.grad(expected, features, retain_graph=True)[0])
    shrinking = torch.autograd.grad(penalty(source, target, PROGRESS), source.features)[0]
    assert (shrinking * source.features).sum() > 0
    assert {"domain_accuracy", "source_spectral_share", "spectral_penalty"} <= whole.alignment.diagnostics.keys()
    assert float(whole.alignment.diagnostics["spectral_penalty"]) == pytest.approx(
        0.01 * float(penalty(source, target, PROGRESS))
    )


def test_complaints_of_the_adversarial_loss_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    alignment = module().alignment
    monkeypatch.setattr(alignment.alignment, "complaints", lambda means, progress: iter([("key", f"{means}")]))
    assert list(alignment.complaints({"train/domain_accuracy": 1.0}, 0.5)) == [
        ("key", "{'train/domain_accuracy': 1.0}")
    ]


def test_bad_values_name_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.penalty_weight"):
        module(penalty_weight=-1.0)
    with pytest.raises(ConfigurationError, match=r"--model\.largest"):
        module(largest=0)
    with pytest.raises(ConfigurationError, match=r"--model\.reversal_gamma"):
        module(reversal_gamma=-1.0)
