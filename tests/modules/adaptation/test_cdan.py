"""The conditional domain-adversarial loss against independent computations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import fit, toy_accuracy

from framework.errors import ConfigurationError
from framework.modules import CDAN
from framework.modules.adaptation.cdan import ConditionalDomainAdversarialLoss, certainty_weights
from framework.networks import NetworkOutputs


def outputs(count: int, shift: float = 0.0, scale: float = 1.0) -> NetworkOutputs:
    features = (torch.randn(count, 6, dtype=torch.float64) + shift).requires_grad_()
    return NetworkOutputs(features, (scale * torch.randn(count, 3, dtype=torch.float64)).requires_grad_())


def loss(**options: Any) -> ConditionalDomainAdversarialLoss:
    defaults: dict[str, Any] = {"hidden_features": 8, "normalization": "none"}
    return ConditionalDomainAdversarialLoss(6, 3, **{**defaults, **options}).double()


def softmax(row: torch.Tensor) -> list[float]:
    exponentials = [math.exp(float(value)) for value in row.detach()]
    return [value / sum(exponentials) for value in exponentials]


def mlp(alignment: ConditionalDomainAdversarialLoss, inputs: list[float]) -> float:
    """The discriminator's probability of the source, in numpy."""
    values = np.array(inputs)
    layers = [layer for layer in alignment.discriminator if isinstance(layer, torch.nn.Linear)]
    for index, layer in enumerate(layers):
        values = layer.weight.detach().numpy() @ values + layer.bias.detach().numpy()
        values = np.maximum(values, 0) if index < len(layers) - 1 else values
    return float(1 / (1 + np.exp(-values[0])))


def loop(alignment: ConditionalDomainAdversarialLoss, domains: list[NetworkOutputs]) -> tuple[list[Any], list[Any]]:
    """Losses and unnormalised CDAN+E weights of both domains' images."""
    losses: list[list[float]] = [[], []]
    weights: list[list[float]] = [[], []]
    for index, domain in enumerate(domains):
        for row, logits in zip(domain.features.detach(), domain.logits, strict=True):
            p = softmax(logits)
            conditioned = [float(f) * q for f in row for q in p]
            if alignment.randomized_features:
                first, second = alignment.feature_map.numpy(), alignment.probability_map.numpy()
                conditioned = list((row.numpy() @ first) * (np.array(p) @ second) / math.sqrt(first.shape[1]))
            probability = mlp(alignment, conditioned)
            losses[index].append(-math.log(probability if index == 0 else 1 - probability))
            weights[index].append(1 + math.exp(sum(q * math.log(q) for q in p)))
    return losses, weights


@pytest.mark.parametrize("randomized", [0, 11])
@pytest.mark.parametrize(("weighting", "factor"), [("mean", 0.5), ("sum", 1.0)])
def test_value_against_a_loop(weighting: Any, factor: float, randomized: int) -> None:
    alignment = loss(domain_weighting=weighting, randomized_features=randomized)
    source, target = outputs(5), outputs(9, 1.0)
    losses, _ = loop(alignment, [source, target])
    expected = factor * sum(sum(part) / len(part) for part in losses)
    assert alignment(source, target, torch.tensor(0.5)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("normalization", ["per_domain", "joint", "none"])
def test_entropy_conditioning_against_a_loop(normalization: Any) -> None:
    alignment = loss(entropy_conditioning=True, entropy_normalization=normalization)
    source, target = outputs(5, scale=4.0), outputs(9, 1.0, scale=0.5)
    losses, weights = loop(alignment, [source, target])
    means = [sum(part) / len(part) for part in weights]
    divisors = {"per_domain": means, "joint": [sum(means) / 2] * 2, "none": [1.0, 1.0]}[normalization]
    expected = 0.0
    for part, weight, divisor in zip(losses, weights, divisors, strict=True):
        expected += 0.5 * sum(w / divisor * value for w, value in zip(weight, part, strict=True)) / len(part)
    assert alignment(source, target, torch.tensor(0.5)).item() == pytest.approx(expected, rel=1e-9)


def test_joint_weights_of_equal_batches_sum_to_both() -> None:
    """TLlib's: the weights of 2n images sum to 2n, over both domains; per domain they sum to n in each."""
    source, target = outputs(7, scale=4.0).logits, outputs(7, scale=0.1).logits
    joint = certainty_weights(source, target, "joint")
    assert torch.cat(joint).sum().item() == pytest.approx(14)
    assert joint[0].sum() > 7.5  # certain predictions weigh more
    per_domain = certainty_weights(source, target, "per_domain")
    assert [part.sum().item() for part in per_domain] == pytest.approx([7, 7])


def test_weights_of_certain_and_uncertain_predictions() -> None:
    certain, guessed = torch.tensor([[1000.0, 0.0, 0.0]]), torch.zeros(1, 3)
    weights = certainty_weights(certain, guessed, "none")
    assert [part.item() for part in weights] == pytest.approx([2.0, 1 + 1 / 3])


@pytest.mark.parametrize("options", [{}, {"entropy_conditioning": True}, {"randomized_features": 16}])
def test_features_get_minus_the_coefficient_times_the_gradient_and_predictions_none(options: dict[str, Any]) -> None:
    alignment, source, target = loss(**options), outputs(5), outputs(5, 1.0)
    progress, coefficient = torch.tensor(0.3), 2 / (1 + math.exp(-10 * 0.3)) - 1
    found = torch.autograd.grad(
        alignment(source, target, progress), [source.features, source.logits, target.logits], allow_unused=True
    )
    assert found[1] is None
    assert found[2] is None
    weights = torch.ones(5, dtype=torch.float64)
    if options.get("entropy_conditioning"):
        weights = certainty_weights(source.logits.detach(), target.logits.detach(), "per_domain")[0]
    conditioned = alignment.condition(source.features, source.logits.detach())
    plain = 0.5 * (weights * torch.nn.functional.softplus(-alignment.discriminator(conditioned))).mean()
    expected = -coefficient * torch.autograd.grad(plain, source.features)[0]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-9)
    assert expected.abs().max() > 0


def test_gradients_of_the_discriminators_side() -> None:
    alignment, source, target = loss(entropy_conditioning=True), outputs(3), outputs(4, 1.0)
    names, values = zip(*alignment.named_parameters(), strict=True)

    def value(*parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(
            alignment, dict(zip(names, parameters, strict=True)), (source, target, torch.tensor(0.5))
        )

    assert torch.autograd.gradcheck(value, values)


def test_order_of_images_does_not_matter() -> None:
    alignment, source, target = loss(entropy_conditioning=True), outputs(6), outputs(4, 1.0)
    order = torch.randperm(6)
    mixed = NetworkOutputs(source.features[order], source.logits[order])
    torch.testing.assert_close(
        alignment(mixed, target, torch.tensor(0.5)), alignment(source, target, torch.tensor(0.5))
    )


def test_it_sees_a_shift_of_the_joint_distribution_that_dann_cannot_see() -> None:
    """Features alike in both domains, predictions alike, but paired differently."""
    torch.manual_seed(0)
    alignment = ConditionalDomainAdversarialLoss(2, 2, hidden_features=32, normalization="none")
    optimizer = torch.optim.Adam(alignment.parameters(), lr=0.01)
    for _ in range(150):
        sign = 2.0 * torch.randint(2, (64, 1)) - 1
        features, logits = torch.cat([sign, sign], dim=1), 4 * torch.cat([sign, -sign], dim=1)
        source, target = NetworkOutputs(features, logits), NetworkOutputs(features, -logits)
        optimizer.zero_grad()
        alignment(source, target, torch.tensor(0.0)).backward()
        optimizer.step()
    assert alignment.diagnostics["domain_accuracy"] > 0.99


# ---------------------------------------------------------------------- the paper's rule
@pytest.mark.parametrize(
    ("classes", "option", "width", "expected"),
    [(16, None, 0, 4096), (17, None, 1024, 1024), (31, 0, 0, 7936), (3, 100, 100, 100)],
)
def test_when_the_map_is_randomised(classes: int, option: int | None, width: int, expected: int) -> None:
    alignment = ConditionalDomainAdversarialLoss(256, classes, randomized_features=option, hidden_features=4)
    assert alignment.randomized_features == width
    assert alignment.discriminator.in_features == expected
    names = {name for name, _ in alignment.named_buffers() if name.endswith("_map")}
    assert names == ({"feature_map", "probability_map"} if width else set())
    assert names <= alignment.state_dict().keys()
    assert not {name for name, _ in alignment.named_parameters()} & {"feature_map", "probability_map"}


def test_random_maps_have_mean_0_and_variance_1() -> None:
    alignment = ConditionalDomainAdversarialLoss(256, 31, hidden_features=4)
    assert alignment.feature_map.mean().abs() < 0.01
    assert alignment.feature_map.var().item() == pytest.approx(1, abs=0.02)
    assert alignment.probability_map.var().item() == pytest.approx(1, abs=0.05)


def test_random_maps_survive_a_resume(domains: Path, tmp_path: Path) -> None:
    """TLlib's are outside the state dict: a resumed run got other ones, to which the discriminator is a stranger."""
    options: dict[str, Any] = {"model": {"randomized_features": 24, "entropy_conditioning": True}, "max_epochs": 2}
    whole = fit(CDAN, domains, save=(7, tmp_path / "stop.ckpt"), **options)
    resumed = fit(CDAN, domains, resume=tmp_path / "stop.ckpt", seed=0, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    torch.manual_seed(123)
    loaded = CDAN.load_from_checkpoint(tmp_path / "stop.ckpt", weights_only=True, map_location="cpu")
    assert torch.equal(loaded.alignment.feature_map, whole.alignment.feature_map)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- diagnostics and errors
def test_diagnostics_of_the_entropy_conditioning() -> None:
    alignment = loss(entropy_conditioning=True)
    source = NetworkOutputs(outputs(4).features, 1000 * torch.eye(4, 3, dtype=torch.float64) * torch.ones(4, 1))
    target = NetworkOutputs(outputs(4).features, torch.zeros(4, 3, dtype=torch.float64))
    alignment(source, target, torch.tensor(0.5))
    assert float(alignment.diagnostics["source_certainty"]) == pytest.approx((3 + 1 / 3) / 4)
    assert float(alignment.diagnostics["target_certainty"]) == pytest.approx(1 / 3)
    w = np.array([2, 2, 2, 4 / 3]) / np.mean([2, 2, 2, 4 / 3])
    weights = np.array([*w, 1, 1, 1, 1])
    assert float(alignment.diagnostics["effective_share"]) == pytest.approx(
        weights.sum() ** 2 / (8 * (weights**2).sum())
    )
    plain = loss()
    plain(source, target, torch.tensor(0.5))
    assert plain.diagnostics.keys() == {"domain_loss", "domain_accuracy", "reversal_coefficient"}


def test_diagnostics_are_without_weights() -> None:
    alignment, source, target = loss(entropy_conditioning=True), outputs(5, scale=3.0), outputs(9, 1.0)
    alignment(source, target, torch.tensor(0.5))
    losses, _ = loop(alignment, [source, target])
    expected = sum(sum(part) / len(part) for part in losses) / 2
    assert float(alignment.diagnostics["domain_loss"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("randomized_features", -1),
        ("entropy_normalization", "both"),
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
        CDAN(3, backbone="resnet8", **{option: value})


@pytest.mark.parametrize("entropy", [False, True])
def test_it_helps_on_a_toy(entropy: bool) -> None:
    options: dict[str, Any] = {"hidden_features": 64, "normalization": "none", "entropy_conditioning": entropy}
    torch.manual_seed(0)
    alignment = ConditionalDomainAdversarialLoss(16, 2, **options)
    assert toy_accuracy(None, "rotation", seed=1, steps=200) < 0.93
    assert toy_accuracy(alignment, "rotation", seed=1, trade_off=0.5, steps=200) > 0.97
