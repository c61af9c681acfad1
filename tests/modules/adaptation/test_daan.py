"""The dynamic adversarial loss against independent computations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import fit, toy_accuracy, weights

from framework.errors import ConfigurationError
from framework.modules import DAAN
from framework.modules.adaptation.daan import ClassDiscriminators, DynamicAdversarialLoss
from framework.networks import NetworkOutputs


def outputs(count: int, shift: float = 0.0) -> NetworkOutputs:
    features = (torch.randn(count, 6, dtype=torch.float64) + shift).requires_grad_()
    return NetworkOutputs(features, (2 * torch.randn(count, 3, dtype=torch.float64)).requires_grad_())


def loss(**options: Any) -> DynamicAdversarialLoss:
    defaults: dict[str, Any] = {"hidden_features": 8, "class_features": 4, "normalization": "none"}
    return DynamicAdversarialLoss(6, 3, **{**defaults, **options}).double()


def half_trained(**options: Any) -> DynamicAdversarialLoss:
    """Discriminators that are right often and wrong often; nothing is counted yet."""
    alignment = loss(**options).eval()
    optimizer = torch.optim.Adam(alignment.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        alignment(outputs(15), outputs(15, 0.5), torch.tensor(0.5)).backward()
        optimizer.step()
    return alignment.train()


def logits_of(alignment: DynamicAdversarialLoss, domain: NetworkOutputs) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the classes' discriminators and of the global one ``[N, K + 1]`` in numpy, and probabilities."""
    parameters = {name: value.detach().numpy() for name, value in alignment.named_parameters()}
    rows, predictions = [], []
    for features, row in zip(domain.features.detach().numpy(), domain.logits.detach().numpy(), strict=True):
        p = np.exp(row) / np.exp(row).sum()
        logits = []
        for k in range(3):
            own = slice(4 * k, 4 * (k + 1))
            hidden = parameters["class_discriminators.first.weight"][own] @ (p[k] * features)
            hidden = np.maximum(hidden + parameters["class_discriminators.first.bias"][own], 0)
            hidden = hidden @ parameters["class_discriminators.second_weight"][k]
            hidden = np.maximum(hidden + parameters["class_discriminators.second_bias"][k, 0], 0)
            logit = hidden @ parameters["class_discriminators.last_weight"][k]
            logits.append((logit + parameters["class_discriminators.last_bias"][k, 0]).item())
        values = features
        for index in (0, 2, 4):
            values = parameters[f"discriminator.{index}.weight"] @ values + parameters[f"discriminator.{index}.bias"]
            values = np.maximum(values, 0) if index < 4 else values
        rows.append([*logits, values.item()])
        predictions.append(p)
    return np.array(rows), np.array(predictions)


def loop(alignment: DynamicAdversarialLoss, domains: list[NetworkOutputs]) -> tuple[float, float, float]:
    """Global loss, local loss and the dynamic factor of a first batch, straight from the definitions."""
    losses, errors = np.zeros(4), np.zeros(4)
    for index, domain in enumerate(domains):
        logits, p = logits_of(alignment, domain)
        label = 1 - index
        for n in range(len(logits)):
            probability = 1 / (1 + np.exp(-logits[n]))
            losses += -np.log(probability if label else 1 - probability) / len(logits) / 2
        weight = np.concatenate([p, np.ones((len(p), 1))], axis=1)
        wrong = (logits > 0) != bool(label)
        errors += (weight * wrong).sum(axis=0) / weight.sum(axis=0) / 2
    distances = np.maximum(2 * (1 - 2 * errors), 0)
    factor = distances[3] / (distances[3] + distances[:3].mean())
    return losses[3], losses[:3].sum(), factor


@pytest.mark.parametrize("factor", ["global_share", "local_share"])
@pytest.mark.parametrize(("weighting", "scale"), [("mean", 1.0), ("sum", 2.0)])
def test_value_against_a_loop(weighting: Any, scale: float, factor: Any) -> None:
    alignment = half_trained(domain_weighting=weighting, dynamic_factor=factor)
    source, target = outputs(15), outputs(9, 0.5)
    global_loss, local_loss, share = loop(alignment, [source, target])
    assert 0.05 < share < 0.95
    omega = share if factor == "global_share" else 1 - share
    expected = scale * ((1 - omega) * global_loss + omega * local_loss)
    assert alignment(source, target, torch.tensor(0.5)).item() == pytest.approx(expected, rel=1e-5)
    assert float(alignment.diagnostics["dynamic_factor"]) == pytest.approx(omega, rel=1e-5)
    assert float(alignment.diagnostics["domain_loss"]) == pytest.approx(global_loss)
    assert float(alignment.diagnostics["local_loss"]) == pytest.approx(local_loss / 3)


def test_class_discriminators_are_separate_networks() -> None:
    networks = ClassDiscriminators(6, 3, 5).double()
    features, probabilities = torch.randn(4, 6).double(), torch.rand(4, 3).double()
    before = networks(features, probabilities)
    assert before.shape == (4, 3)
    with torch.no_grad():
        networks.second_weight[1].zero_()
        networks.first.weight[10:].zero_()
    changed = (networks(features, probabilities) - before).abs().amax(dim=0)
    assert changed[0] == 0
    assert changed[1] > 0
    assert changed[2] > 0
    other = probabilities.clone()
    other[:, 0] += 1
    assert torch.equal(networks(features, other)[:, 1:], networks(features, probabilities)[:, 1:])


def test_gradients_of_the_class_discriminators() -> None:
    networks = ClassDiscriminators(3, 2, 4).double()
    features, probabilities = torch.randn(3, 3).double().requires_grad_(), torch.rand(3, 2).double()
    assert torch.autograd.gradcheck(lambda x: networks(x, probabilities), (features,))
    names, values = zip(*networks.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda *parameters: torch.func.functional_call(
            networks, dict(zip(names, parameters, strict=True)), (features.detach(), probabilities)
        ),
        values,
    )


def test_order_of_images_does_not_matter() -> None:
    alignment, source, target = loss().eval(), outputs(6), outputs(4, 1.0)
    order = torch.randperm(6)
    mixed = NetworkOutputs(source.features[order], source.logits[order])
    torch.testing.assert_close(
        alignment(mixed, target, torch.tensor(0.5)), alignment(source, target, torch.tensor(0.5))
    )


# ---------------------------------------------------------------------- DeepDA's defects (METHODS 1.1)
def test_the_target_is_not_called_source() -> None:
    """DeepDA's local loss labels both domains "source": a discriminator that says so to all has no loss."""
    alignment = loss().eval()
    with torch.no_grad():
        for layer in (alignment.discriminator[-1].weight, alignment.class_discriminators.last_weight):
            layer.zero_()
        alignment.discriminator[-1].bias.fill_(3.0)
        alignment.class_discriminators.last_bias.fill_(3.0)
    alignment(outputs(5), outputs(9), torch.tensor(0.5))
    expected = (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 2
    assert float(alignment.diagnostics["local_loss"]) == pytest.approx(expected)
    assert float(alignment.diagnostics["domain_loss"]) == pytest.approx(expected)
    assert float(alignment.diagnostics["domain_accuracy"]) == 0.5


@pytest.mark.parametrize("part", ["global", "classes"])
def test_the_reversal_is_not_stuck_at_1(part: str) -> None:
    """DeepDA's local discriminators get a coefficient of 1 from the first step on."""
    alignment, source, target = loss().eval(), outputs(5), outputs(5, 1.0)
    omega = 0.0 if part == "global" else 1.0
    alignment.factor = lambda *_: torch.tensor(omega)  # type: ignore[method-assign]
    gradients = {}
    for progress in (0.0, 0.3, 1.0):
        value = alignment(source, target, torch.tensor(progress))
        gradients[progress] = torch.autograd.grad(value, source.features)[0]
    assert gradients[0.0].abs().max() == 0
    assert gradients[1.0].abs().max() > 0
    ratio = (2 / (1 + math.exp(-3)) - 1) / (2 / (1 + math.exp(-10)) - 1)
    torch.testing.assert_close(gradients[0.3], ratio * gradients[1.0], rtol=1e-4, atol=1e-9)
    # reversed: the discriminator's own gradient at the features has the other sign
    probabilities = source.logits.detach().softmax(dim=1)
    logits = alignment.discriminator(source.features)
    if part == "classes":
        logits = alignment.class_discriminators(source.features, probabilities)
    plain = 0.5 * torch.nn.functional.softplus(-logits).sum() / 5
    expected = -(2 / (1 + math.exp(-10)) - 1) * torch.autograd.grad(plain, source.features)[0]
    torch.testing.assert_close(gradients[1.0], expected, rtol=1e-4, atol=1e-9)


def test_distances_do_not_depend_on_the_scale_of_the_loss() -> None:
    """DeepDA takes the A-distance of losses that are multiplied by 0.05 and 0.01: nearly 2, always."""
    first, second = half_trained(domain_weighting="mean"), loss(domain_weighting="sum")
    second.load_state_dict(first.state_dict())
    source, target = outputs(15), outputs(9, 0.5)
    for alignment in (first, second):
        alignment(source, target, torch.tensor(0.5))
    for name in ("dynamic_factor", "global_distance", "class_distance"):
        assert 0.05 < float(first.diagnostics[name]) < 1.95
        torch.testing.assert_close(first.diagnostics[name], second.diagnostics[name])
    with torch.no_grad():  # a discriminator that is right half the time is at distance 0, however sure it is
        first.discriminator[-1].weight.zero_()
        first.discriminator[-1].bias.fill_(0.01)
    first.error_sums.zero_()
    first.error_weights.zero_()
    first(source, target, torch.tensor(0.5))
    assert float(first.diagnostics["global_distance"]) == 0
    assert float(first.diagnostics["dynamic_factor"]) < 1e-3


def test_no_gradient_reaches_the_predictions() -> None:
    """In the published codes the domains' loss goes down through the probabilities too, not reversed."""
    alignment, source, target = loss(), outputs(5), outputs(5, 1.0)
    value = alignment(source, target, torch.tensor(0.5))
    assert torch.autograd.grad(value, [source.logits, target.logits], allow_unused=True) == (None, None)


# ---------------------------------------------------------------------- the dynamic factor
def test_factor_is_a_half_before_the_first_batch_and_stands_still_in_evaluation() -> None:
    alignment, source, target = loss().eval(), outputs(15), outputs(9, 1.0)
    state = weights(alignment)
    for _ in range(2):
        alignment(source, target, torch.tensor(0.5))
        assert float(alignment.diagnostics["dynamic_factor"]) == 0.5
    assert all(torch.equal(value, state[name]) for name, value in alignment.state_dict().items())
    alignment.train()
    alignment(source, target, torch.tensor(0.5))
    assert not torch.equal(alignment.error_sums, state["error_sums"])


def test_errors_are_means_over_batches_weighted_by_the_predictions() -> None:
    """Against a loop over three batches: the memory weighs batches, the predictions weigh images within them."""
    alignment = half_trained(error_memory=0.8)
    sums, masses = np.zeros((2, 4)), np.zeros((2, 4))
    for batch in range(3):
        domains = [outputs(7 + batch), outputs(5, 0.5)]
        alignment(*domains, torch.tensor(0.5))
        for index, domain in enumerate(domains):
            logits, p = logits_of(alignment, domain)
            weight = np.concatenate([p, np.ones((len(p), 1))], axis=1)
            wrong = (logits > 0) if index else (logits <= 0)
            sums[index] = 0.8 * sums[index] + 0.2 * (weight * wrong).mean(axis=0)
            masses[index] = 0.8 * masses[index] + 0.2 * weight.mean(axis=0)
    distances = np.maximum(2 * (1 - 2 * (sums / masses).mean(axis=0)), 0)
    assert float(alignment.diagnostics["global_distance"]) == pytest.approx(distances[3])
    assert float(alignment.diagnostics["class_distance"]) == pytest.approx(distances[:3].mean())


def test_a_class_that_no_image_has_gives_no_nan() -> None:
    alignment = loss()
    for _ in range(3):
        source, target = outputs(4), outputs(4)
        certain = torch.tensor([1000.0, 0.0, 0.0], dtype=torch.float64).repeat(4, 1)
        pair = NetworkOutputs(source.features, certain), NetworkOutputs(target.features, certain)
        value = alignment(*pair, torch.tensor(1.0))
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, source.features)[0]).all()
    assert 0 <= float(alignment.diagnostics["dynamic_factor"]) <= 1


def test_the_mean_errors_survive_a_resume(domains: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": {"discriminator_normalization": "dropout"}, "max_epochs": 2}
    whole = fit(DAAN, domains, save=(7, tmp_path / "stop.ckpt"), **options)
    resumed = fit(DAAN, domains, resume=tmp_path / "stop.ckpt", **options)
    assert whole.alignment.error_weights[:, -1].min() > 0.05  # type: ignore[index]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# ---------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dynamic_factor", "both"),
        ("error_memory", 1.0),
        ("class_discriminator_features", 0),
        ("discriminator_features", 0),
        ("domain_weighting", "half"),
        ("reversal_maximum", -1.0),
    ],
)
def test_bad_values_name_the_flag(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"--model\.{option}"):
        DAAN(3, backbone="resnet8", **{option: value})


def test_complains_as_dann_does() -> None:
    means = {"train/domain_accuracy": 0.999, "train/reversal_coefficient": 0.9}
    assert [key for key, _ in loss().complaints(means, 0.5)] == ["saturated"]


@pytest.mark.parametrize("factor", ["global_share", "local_share"])
def test_it_helps_on_a_toy(factor: Any) -> None:
    torch.manual_seed(0)
    alignment = DynamicAdversarialLoss(
        16, 2, hidden_features=64, class_features=32, normalization="none", dynamic_factor=factor
    )
    assert toy_accuracy(None, "rotation", seed=1, steps=200) < 0.93
    assert toy_accuracy(alignment, "rotation", seed=1, trade_off=0.5, steps=200) > 0.97
