"""Adaptive feature norm: value, gradient, and that norms grow by the step that it claims."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.modules import AFN
from framework.modules.adaptation.afn import AdaptiveFeatureNormLoss
from framework.networks import NetworkOutputs

PROGRESS = torch.tensor(0.0)


def outputs(count: int, scale: float = 1.0) -> NetworkOutputs:
    features = (scale * torch.randn(count, 6, dtype=torch.float64)).requires_grad_()
    return NetworkOutputs(features, torch.randn(count, 3, dtype=torch.float64).requires_grad_())


def norm(row: Tensor) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in row.detach()))


def test_hard_value_against_a_loop() -> None:
    source, target = outputs(4), outputs(7, 3.0)
    expected = 0.0
    for domain in (source, target):
        expected += (sum(norm(row) for row in domain.features) / len(domain.features) - 25) ** 2
    loss = AdaptiveFeatureNormLoss("hard")
    assert float(loss(source, target, PROGRESS)) == pytest.approx(expected)
    assert float(loss.diagnostics["source_norm"]) == pytest.approx(sum(map(norm, source.features)) / 4)
    assert float(loss.diagnostics["target_norm"]) == pytest.approx(sum(map(norm, target.features)) / 7)


def test_stepwise_value_is_the_squared_step_of_each_domain() -> None:
    value = AdaptiveFeatureNormLoss(step=0.3)(outputs(4), outputs(7), PROGRESS)
    assert float(value) == pytest.approx(2 * 0.3**2)


def test_stepwise_gradient_against_a_loop() -> None:
    """The bracket is a constant: through it the gradient would be 0."""
    source, target = outputs(4), outputs(7, 3.0)
    value = AdaptiveFeatureNormLoss(step=0.3)(source, target, PROGRESS)
    gradients = torch.autograd.grad(value, [source.features, target.features])
    for domain, gradient in zip((source, target), gradients, strict=True):
        for row, mine in zip(domain.features.detach(), gradient, strict=True):
            torch.testing.assert_close(mine, -2 * 0.3 / len(gradient) * row / norm(row))


def test_hard_gradient() -> None:
    source, target, loss = outputs(4), outputs(5), AdaptiveFeatureNormLoss("hard")

    def of_features(first: Tensor, second: Tensor) -> Tensor:
        return loss(source._replace(features=first), target._replace(features=second), PROGRESS)

    assert torch.autograd.gradcheck(of_features, (source.features, target.features))


@pytest.mark.parametrize("variant", ["stepwise", "hard"])
def test_features_of_zero_have_a_finite_gradient(variant) -> None:
    source, target = outputs(4, 0.0), outputs(7)
    value = AdaptiveFeatureNormLoss(variant)(source, target, PROGRESS)
    assert torch.autograd.grad(value, source.features)[0].isfinite().all()


def test_a_gradient_step_grows_each_norm_by_the_claimed_step() -> None:
    """On ``(|f| - (|f| + step))^2`` a rate of 1/2 moves each feature to the norm that was asked for."""
    source, target = outputs(4), outputs(7, 3.0)
    AdaptiveFeatureNormLoss(step=0.7)(source, target, PROGRESS).backward()
    for domain in (source, target):
        before = domain.features.detach()
        after = before - 0.5 * len(before) * domain.features.grad
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1) + 0.7)
        torch.testing.assert_close(after / after.norm(dim=1, keepdim=True), before / before.norm(dim=1, keepdim=True))


def test_minimising_the_hard_variant_gives_the_radius() -> None:
    source, target, loss = outputs(4), outputs(7, 3.0), AdaptiveFeatureNormLoss("hard", radius=9.0)
    optimizer = torch.optim.SGD([source.features, target.features], lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        loss(source, target, PROGRESS).backward()
        optimizer.step()
    assert float(source.features.detach().norm(dim=1).mean()) == pytest.approx(9.0, abs=1e-2)
    assert float(target.features.detach().norm(dim=1).mean()) == pytest.approx(9.0, abs=1e-2)


def test_entropy_of_the_target_is_added_with_its_weight() -> None:
    source, target = outputs(4), outputs(7)
    loss = AdaptiveFeatureNormLoss(entropy_weight=2.0)
    probabilities = target.logits.detach().softmax(1)
    entropy = float(-(probabilities * probabilities.log()).sum(1).mean())
    assert float(loss(source, target, PROGRESS)) == pytest.approx(2 + 2.0 * entropy)
    assert float(loss.diagnostics["target_entropy"]) == pytest.approx(entropy)


def test_order_of_images_does_not_matter() -> None:
    source, target, loss = outputs(4), outputs(7), AdaptiveFeatureNormLoss("hard")
    shuffled = target._replace(features=target.features[torch.randperm(7)])
    torch.testing.assert_close(loss(source, shuffled, PROGRESS), loss(source, target, PROGRESS))


def test_dropout_keeps_the_expected_square_of_the_norm() -> None:
    """Standard dropout at 0.5 doubles it: norms would shrink by sqrt(2) when the model is used."""
    module = AFN(3, backbone="resnet8", bottleneck_features=64, bottleneck_dropout=0.5, bottleneck_normalization="none")
    images = torch.randn(1, 3, 16, 16)
    expected = module.eval().outputs(images)
    module.train()
    module.backbone.eval()
    squares = torch.stack([module.outputs(images).features.square().sum() for _ in range(400)])
    assert float(squares.detach().mean() / expected.features.square().sum().detach()) == pytest.approx(1, abs=0.05)
    outputs = module.outputs(images)
    torch.testing.assert_close(module.head(outputs.features), outputs.logits)
    # what the head is given in use is what the bottleneck gives
    features = module.eval().bottleneck(module.backbone(images))
    assert torch.equal(features, expected.features)


def test_without_dropout_nothing_is_scaled() -> None:
    for options in ({"bottleneck_features": 0}, {"bottleneck_dropout": 0.0}):
        module = AFN(3, backbone="resnet8", **options)
        module.train()
        images = torch.randn(4, 3, 16, 16)
        torch.testing.assert_close(module.outputs(images).features, module.bottleneck(module.backbone(images)))


def test_bad_values_name_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.variant"):
        AFN(3, backbone="resnet8", variant="soft")  # type: ignore[arg-type]
    for flag in ("step", "radius", "entropy_weight"):
        with pytest.raises(ConfigurationError, match=rf"--model\.{flag}"):
            AFN(3, backbone="resnet8", **{flag: -1.0})
