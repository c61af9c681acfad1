"""Distillation: value and gradient against loops in float64, T^2, the teacher's share."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

import framework.functional.distillation
from framework.functional.distillation import distillation_loss


def softened(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def loop(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The divergence without T^2, image by image and class by class."""
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softened(theirs, temperature), softened(ours, temperature)
        total += sum(p[k] * math.log(p[k] / q[k]) for k in range(len(p)))
    return total / len(student)


def logits(count: int = 5, classes: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(count, classes, dtype=torch.float64), 2 * torch.randn(count, classes, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_value_against_a_loop(temperature: float) -> None:
    student, teacher = logits()
    expected = loop(student, teacher, temperature)
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(temperature**2 * expected)
    plain = distillation_loss(student, teacher, temperature, squared_temperature=False)
    assert float(plain) == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_against_a_loop(temperature: float) -> None:
    """``T^2 * (q_k - p_k) / (T N)``."""
    student, teacher = logits()
    student.requires_grad_()
    found = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)[0]
    for i in range(len(student)):
        p = softened(teacher[i].tolist(), temperature)
        q = softened(student[i].tolist(), temperature)
        for k in range(len(p)):
            expected = temperature**2 * (q[k] - p[k]) / (temperature * len(student))
            assert float(found[i, k]) == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher, temperature), student)


def test_the_square_keeps_the_gradients_scale() -> None:
    """At a high temperature the gradient tends to that of half the squared difference of centred logits, over K N."""
    student, teacher = logits()
    student.requires_grad_()
    found = torch.autograd.grad(distillation_loss(student, teacher, 1e5), student)[0]
    difference = (student - teacher).detach()
    expected = (difference - difference.mean(1, keepdim=True)) / difference.numel()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits()
    student.requires_grad_()
    teacher.requires_grad_()
    loss = distillation_loss(student, teacher, 2.0)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_agreement_is_zero_and_a_minimum() -> None:
    student, teacher = logits()
    assert float(distillation_loss(student, teacher)) > 0.01
    same = (teacher + 3.0).requires_grad_()  # a shift of all logits changes no prediction
    loss = distillation_loss(same, teacher, 2.0)
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, same)[0].abs().max() < 1e-12


def test_certain_predictions_stay_finite() -> None:
    student = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    loss = distillation_loss(student, torch.tensor([[-1000.0, 0.0, 1000.0]]))
    assert float(loss) == pytest.approx(2000)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_float32_under_autocast() -> None:
    student, teacher = (tensor.float() for tensor in logits(64, 50))
    expected = distillation_loss(student, teacher, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distillation_loss(student, teacher, 2.0), expected)
        half = distillation_loss(student.bfloat16(), teacher.bfloat16(), 2.0)
    assert half.dtype == torch.float32
    assert torch.equal(half, distillation_loss(student.bfloat16().float(), teacher.bfloat16().float(), 2.0))


def test_examples() -> None:
    assert doctest.testmod(framework.functional.distillation, extraglobs={"torch": torch}) == (0, 1)
