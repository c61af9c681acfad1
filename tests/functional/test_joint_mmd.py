"""The joint MMD against loops over Python numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from framework.errors import ConfigurationError
from framework.functional import FIVE_SCALES, biased_mmd, joint_mmd, linear_time_mmd, unbiased_mmd

ESTIMATORS: list[Any] = ["biased", "unbiased", "linear_time"]
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def layers(count: int, seed: int = 0, shift: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 5, generator=generator, dtype=torch.float64) + shift
    logits = 2 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    logits[:, 0] += shift
    return [features, logits.softmax(1)]


def loop_distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def loop_joint_mmd(estimator: str, source: list[Tensor], target: list[Tensor]) -> float:
    features, probabilities = (torch.cat(pair).tolist() for pair in zip(source, target, strict=True))
    n, m = len(source[0]), len(target[0])
    width = sum(loop_distance(a, b) for a in features for b in features) / (n + m) ** 2

    def k(i: int, j: int) -> float:
        """i, j: indices into the joint sample, the source first."""
        d = loop_distance(features[i], features[j])
        of_features = sum(math.exp(-d / (2 * 2.0**u * width)) for u in range(-3, 2))
        return of_features * math.exp(-loop_distance(probabilities[i], probabilities[j]) / (2 * 0.92**2))

    s, t = range(n), range(n, n + m)
    if estimator == "linear_time":  # disjoint pairs
        h = [k(s[i], s[i + 1]) + k(t[i], t[i + 1]) - k(s[i], t[i + 1]) - k(s[i + 1], t[i]) for i in range(0, n - 1, 2)]
        return sum(h) / len(h)
    between = sum(k(i, j) for i in s for j in t) / (n * m)
    if estimator == "biased":
        return sum(k(i, j) for i in s for j in s) / n**2 + sum(k(i, j) for i in t for j in t) / m**2 - 2 * between
    within_source = sum(k(i, j) for i in s for j in s if i != j) / (n * (n - 1))
    within_target = sum(k(i, j) for i in t for j in t if i != j) / (m * (m - 1))
    return within_source + within_target - 2 * between


@each_estimator
@pytest.mark.parametrize("sizes", [(2, 2), (7, 7), (6, 9)])
def test_against_a_loop(estimator: Any, sizes: tuple[int, int]) -> None:
    source, target = layers(sizes[0]), layers(sizes[1], seed=1, shift=0.7)
    if estimator == "linear_time" and sizes[0] != sizes[1]:
        with pytest.raises(ConfigurationError, match="same number of samples for the linear-time estimator"):
            joint_mmd(source, target, estimator)
        return
    expected = loop_joint_mmd(estimator, source, target)
    assert joint_mmd(source, target, estimator).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("estimator", "of_one"), [("biased", biased_mmd), ("unbiased", unbiased_mmd), ("linear_time", linear_time_mmd)]
)
def test_of_one_layer_it_is_the_mmd(estimator: Any, of_one: Any) -> None:
    source, target = layers(6)[0], layers(6, seed=1, shift=0.7)[0]
    found = joint_mmd([source], [target], estimator, scales=[FIVE_SCALES], bandwidths=[None])
    assert torch.equal(found, of_one(source, target))


@each_estimator
def test_gradients_flow_through_every_layer(estimator: Any) -> None:
    inputs = [x.requires_grad_() for x in layers(4) + layers(4, seed=1, shift=0.7)]

    def value(*tensors: Tensor) -> Tensor:
        return joint_mmd(tensors[:2], tensors[2:], estimator, bandwidths=[3.0, 0.5])

    assert torch.autograd.gradcheck(value, inputs)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(joint_mmd(inputs[:2], inputs[2:], estimator), inputs))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_order_of_samples_domains_and_layers(estimator: Any) -> None:
    source, target = layers(7), layers(5, seed=1, shift=0.7)
    expected = joint_mmd(source, target, estimator)
    order = torch.randperm(7)
    torch.testing.assert_close(joint_mmd([x[order] for x in source], target, estimator), expected)
    torch.testing.assert_close(joint_mmd(target, source, estimator), expected)
    found = joint_mmd(source[::-1], target[::-1], estimator, [(1.0,), FIVE_SCALES], [0.92**2, None])
    torch.testing.assert_close(found, expected)
    # but which prediction goes with which features counts: the marginals alone are aligned by two MMDs
    assert (joint_mmd([source[0], source[1][order]], target, estimator) - expected).abs() > 1e-4


def test_sees_a_shift_that_no_marginal_has() -> None:
    features = torch.tensor([[-1.0], [1.0]]).repeat(8, 1)
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(8, 1)
    swapped = probabilities.flip(1)
    assert biased_mmd(features, features) + biased_mmd(probabilities, swapped) < 1e-5
    assert joint_mmd([features, probabilities], [features, swapped], "biased") > 0.1


def test_unbiased_has_a_mean_of_0_where_distributions_are_equal() -> None:
    values = []
    for seed in range(200):
        both = layers(16, seed=seed)
        values.append(joint_mmd([x[:8] for x in both], [x[8:] for x in both]).item())
    draws = torch.tensor(values)
    error = draws.std() / math.sqrt(len(draws))
    assert (draws.mean() / error).abs() < 4
    assert ((draws.mean() + 2 / 7) / error).abs() > 4  # TLlib's constant would show


@each_estimator
def test_equal_outputs_and_autocast(estimator: Any) -> None:
    rows = [torch.tensor([[0.1, 300.3, -7.0]]).repeat(6, 1).requires_grad_(), torch.full((6, 3), 1 / 3)]
    loss = joint_mmd(rows, [x.detach() for x in rows], estimator)
    assert abs(loss.item()) < 1e-6
    assert torch.autograd.grad(loss, rows[0])[0].abs().max() == 0
    source, target = ([x.float() for x in layers(8, seed=s, shift=s)] for s in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(joint_mmd(source, target, estimator), joint_mmd(source, target, estimator).float())
        found = joint_mmd([x.bfloat16() for x in source], target, estimator)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(joint_mmd(source, target, estimator).item(), rel=2e-2)


def test_no_tensor_of_pairs_and_features() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, value.numel() if isinstance(value, Tensor) else 0)
            return result

    source, target = ([torch.randn(20, 50, requires_grad=True), torch.rand(20, 40)] for _ in range(2))
    with Watch():
        joint_mmd(source, target).backward()
    assert 400 <= largest <= 40 * 50  # the joint sample of features; all pairs with their features are 20 * 20 * 50


def test_errors() -> None:
    source = layers(4)
    with pytest.raises(ConfigurationError, match="`estimator` to be one of biased, unbiased, linear_time, but got 'u'"):
        joint_mmd(source, source, "u")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"one entry for each layer, but got 2, 1, 2, 2 entries"):
        joint_mmd(source, source[:1])
    with pytest.raises(ConfigurationError, match=r"layers of `source` to have the same number of samples, .*\[4, 3\]"):
        joint_mmd([source[0], source[1][:3]], source)
    with pytest.raises(ConfigurationError, match="at least 2 samples"):
        joint_mmd([x[:1] for x in source], source)
