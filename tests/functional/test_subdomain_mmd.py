"""The local MMD against loops over Python numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from framework.errors import ConfigurationError
from framework.functional import biased_mmd, local_mmd

CLASSES = 4
each_count = pytest.mark.parametrize("classes", ["all", "shared"])


def batch(n: int, m: int, labels: list[int] | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(m, 3, generator=generator, dtype=torch.float64) + 0.7
    logits = 2 * torch.randn(m, CLASSES, generator=generator, dtype=torch.float64)
    given = torch.arange(n) % CLASSES if labels is None else torch.tensor(labels)
    return source, target, given, logits.softmax(1)


def loop_local_mmd(
    source: Tensor, target: Tensor, labels: Tensor, probabilities: Tensor, classes: str, bandwidth: float | None = None
) -> float:
    s, t, y, p = source.tolist(), target.tolist(), labels.tolist(), probabilities.tolist()

    def distance(a: list[float], b: list[float]) -> float:
        return sum((x - z) ** 2 for x, z in zip(a, b, strict=True))

    joint = s + t
    width = sum(distance(a, b) for a in joint for b in joint) / len(joint) ** 2 if bandwidth is None else bandwidth

    def k(a: list[float], b: list[float]) -> float:
        return sum(math.exp(-distance(a, b) / (2 * 2.0**u * width)) for u in range(-3, 2))

    present = set(y)
    if classes == "shared":
        present &= {row.index(max(row)) for row in p}
    total = 0.0
    for c in present:
        w = [(label == c) / y.count(c) for label in y]
        mass = sum(row[c] for row in p)
        v = [row[c] / mass for row in p]
        assert sum(w) == pytest.approx(1)
        total += sum(w[i] * w[j] * k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)))
        total += sum(v[i] * v[j] * k(t[i], t[j]) for i in range(len(t)) for j in range(len(t)))
        total -= 2 * sum(w[i] * v[j] * k(s[i], t[j]) for i in range(len(s)) for j in range(len(t)))
    if classes == "shared":
        return total / len(present) if present else 0.0
    return total / CLASSES


@each_count
@pytest.mark.parametrize(
    ("n", "m", "labels"), [(8, 8, None), (5, 9, None), (6, 4, [0, 0, 2, 2, 2, 0]), (3, 1, [3, 3, 3]), (1, 1, [0])]
)
def test_against_a_loop(classes: Any, n: int, m: int, labels: list[int] | None) -> None:
    for seed in range(3):
        arguments = batch(n, m, labels, seed)
        assert local_mmd(*arguments, classes).item() == pytest.approx(loop_local_mmd(*arguments, classes), abs=1e-12)


@each_count
def test_gradients_at_fixed_weights_and_bandwidth(classes: Any) -> None:
    source, target, labels, probabilities = batch(5, 4, [0, 1, 1, 3, 0])
    bandwidth = torch.tensor(2.0, dtype=torch.float64)
    inputs = source.requires_grad_(), target.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, t: local_mmd(s, t, labels, probabilities, classes, bandwidth=bandwidth), inputs
    )


def test_the_weights_have_no_gradient() -> None:
    source, target, labels, probabilities = batch(6, 6)
    loss = local_mmd(source.requires_grad_(), target, labels, probabilities.requires_grad_())
    assert torch.autograd.grad(loss, probabilities, allow_unused=True)[0] is None


@each_count
def test_of_one_class_it_is_the_mmd(classes: Any) -> None:
    source, target, _, _ = batch(6, 5)
    labels, probabilities = torch.zeros(6, dtype=torch.long), torch.ones(5, 1, dtype=torch.float64)
    torch.testing.assert_close(local_mmd(source, target, labels, probabilities, classes), biased_mmd(source, target))


def test_sees_swapped_classes_that_the_mmd_does_not() -> None:
    source = torch.tensor([[-1.0], [1.0]]).repeat(8, 1)
    labels, probabilities = torch.tensor([0, 1]).repeat(8), torch.eye(2).repeat(8, 1)
    assert local_mmd(source, source, labels, probabilities).abs() < 1e-5
    assert biased_mmd(source, -source).abs() < 1e-5
    assert local_mmd(source, -source, labels, probabilities) > 1


@each_count
def test_order_of_samples_and_common_scale(classes: Any) -> None:
    source, target, labels, probabilities = batch(7, 5)
    expected = local_mmd(source, target, labels, probabilities, classes)
    order, other = torch.randperm(7), torch.randperm(5)
    found = local_mmd(50 * source[order], 50 * target[other], labels[order], probabilities[other], classes)
    torch.testing.assert_close(found, expected)
    renamed = torch.tensor([2, 0, 3, 1])
    found = local_mmd(source, target, renamed[labels], probabilities[:, renamed.argsort()], classes)
    torch.testing.assert_close(found, expected)


@each_count
def test_missing_classes_are_not_nan(classes: Any) -> None:
    """DeepDA divides by the number of shared classes, and skips the batch when the loss is NaN."""
    source, target, _, _ = batch(4, 4)
    for labels, target_class in (([0, 0, 1, 1], 2), ([3, 3, 3, 3], 3)):
        probabilities = torch.eye(CLASSES, dtype=torch.float64)[target_class].repeat(4, 1)  # exact zeros elsewhere
        loss = local_mmd(source.requires_grad_(), target, torch.tensor(labels), probabilities, classes)
        (gradient,) = torch.autograd.grad(loss, source)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert (loss > 0) == (target_class == 3)
        assert (gradient.abs().max() > 0) == (target_class == 3)


def test_tiny_probabilities_in_float32() -> None:
    source, target, labels, _ = (x.float() if x.is_floating_point() else x for x in batch(8, 8))
    logits = torch.zeros(8, CLASSES)
    logits[:, 0] = 95.0  # the others' probabilities are 0 or denormal
    for classes in ("all", "shared"):
        loss = local_mmd(source.requires_grad_(), target, labels, logits.softmax(1), classes)  # type: ignore[arg-type]
        assert 0 <= loss < 20
        assert torch.autograd.grad(loss, source)[0].isfinite().all()


def test_autocast_and_half_precision() -> None:
    source, target, labels, probabilities = (x.float() if x.is_floating_point() else x for x in batch(8, 8))
    expected = local_mmd(source, target, labels, probabilities)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(local_mmd(source, target, labels, probabilities), expected)
        found = local_mmd(source.bfloat16(), target.bfloat16(), labels, probabilities.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


def test_waits_for_no_device_and_has_no_loop_over_classes() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            operations.append(str(function))
            return function(*args, **(kwargs or {}))

    counts = []
    for classes in (2, 50):
        operations: list[str] = []
        with Watch():
            local_mmd(
                torch.randn(6, 3, requires_grad=True), torch.randn(6, 3), torch.arange(6) % 2, torch.ones(6, classes)
            ).backward()
        assert not any("_local_scalar_dense" in name or "nonzero" in name for name in operations)
        counts.append(len(operations))
    assert counts[0] == counts[1] > 0


def test_errors() -> None:
    source, target, labels, probabilities = batch(4, 5)
    with pytest.raises(ConfigurationError, match=r"`source_labels` to have shape \[4\], but got \[3\]"):
        local_mmd(source, target, labels[:3], probabilities)
    with pytest.raises(ConfigurationError, match=r"`target_probabilities` to have shape \[5, classes\], .*\[4, 4\]"):
        local_mmd(source, target, labels, probabilities[:4])
    with pytest.raises(ConfigurationError, match="`classes` to be 'all' or 'shared', but got 'some'"):
        local_mmd(source, target, labels, probabilities, "some")  # type: ignore[arg-type]
