"""Batch nuclear-norm maximisation: value, gradient, what maximising it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contract import toy_accuracy
from torch import Tensor

from framework.errors import ConfigurationError
from framework.modules import BNM
from framework.modules.adaptation.bnm import BatchNuclearNormLoss
from framework.networks import NetworkOutputs

PROGRESS = torch.tensor(0.0)


def outputs(logits: Tensor) -> NetworkOutputs:
    return NetworkOutputs(torch.zeros(len(logits), 2, dtype=logits.dtype), logits)


SOURCE = outputs(torch.randn(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
@pytest.mark.parametrize("normalization", ["batch", "min_batch_classes"])
def test_value_against_the_eigenvalues_of_the_gram_matrix(normalization: Any, shape: tuple[int, int]) -> None:
    """Divided by the batch size, as the paper has it; DeepDA's mean of the singular values is an option."""
    logits = torch.randn(shape, dtype=torch.float64)
    powers = np.exp(logits.numpy())
    rows = powers / powers.sum(1, keepdims=True)
    norm = np.sqrt(np.linalg.eigvalsh(rows @ rows.T).clip(min=0)).sum()
    expected = -norm / (shape[0] if normalization == "batch" else min(shape))
    value = BatchNuclearNormLoss(normalization)(SOURCE, outputs(logits), PROGRESS)
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_the_default_is_the_papers() -> None:
    assert float(BatchNuclearNormLoss()(SOURCE, outputs(1000 * torch.eye(3).repeat(4, 1)), PROGRESS)) == pytest.approx(
        -3 * 4**0.5 / 12  # three singular values, each the root of 4 images
    )


def test_gradient_of_the_target_alone() -> None:
    loss = BatchNuclearNormLoss()
    target = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: loss(SOURCE, outputs(logits), PROGRESS), target)
    source = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    value = loss(outputs(source), outputs(target), PROGRESS)
    assert torch.autograd.grad(value, source, allow_unused=True) == (None,)


def test_collapsed_predictions_have_a_finite_gradient() -> None:
    """All rows equal: rank one, with two singular values at 0."""
    for row in ([0.0, 0.0, 0.0], [50.0, 0.0, -50.0], [1000.0, 0.0, 0.0]):
        logits = torch.tensor(row).repeat(8, 1).requires_grad_()
        value = BatchNuclearNormLoss()(SOURCE, outputs(logits), PROGRESS)
        assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_order_of_images_does_not_matter() -> None:
    logits, loss = torch.randn(8, 3, dtype=torch.float64), BatchNuclearNormLoss()
    order = torch.randperm(8)
    first = loss(SOURCE, outputs(logits), PROGRESS)
    torch.testing.assert_close(loss(SOURCE, outputs(logits[order]), PROGRESS), first)


def test_diagnostics_have_fixed_ends() -> None:
    loss = BatchNuclearNormLoss()
    for logits, expected in ((1000 * torch.eye(4).repeat(2, 1), 1.0), (torch.tensor([[1000.0, 0, 0, 0]] * 8), 0.5)):
        loss(SOURCE, outputs(logits), PROGRESS)
        assert float(loss.diagnostics["relative_nuclear_norm"]) == pytest.approx(expected)
        assert float(loss.diagnostics["target_entropy"]) == pytest.approx(0)
    loss(SOURCE, outputs(torch.zeros(8, 4)), PROGRESS)
    assert float(loss.diagnostics["relative_nuclear_norm"]) == pytest.approx(0.25)


def test_minimising_it_makes_predictions_certain_and_diverse() -> None:
    """Entropy minimisation alone would move all images to the one class that all of them lean to."""
    logits = (0.3 * torch.randn(30, 3) + torch.tensor([0.5, 0.0, 0.0])).requires_grad_()
    optimizer, loss = torch.optim.Adam([logits], lr=0.1), BatchNuclearNormLoss()
    for _ in range(200):
        optimizer.zero_grad()
        loss(SOURCE, outputs(logits), PROGRESS).backward()
        optimizer.step()
    probabilities = logits.softmax(1)
    assert probabilities.max(1).values.min() > 0.9
    assert probabilities.mean(0).min() > 0.15


def test_bad_values_name_the_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.normalization"):
        BNM(3, backbone="resnet8", normalization="mean")  # type: ignore[arg-type]


def test_it_helps_on_a_toy() -> None:
    source_only = [toy_accuracy(None, "rotation", seed=seed) for seed in range(3)]
    adapted = [toy_accuracy(BatchNuclearNormLoss(), "rotation", seed=seed) for seed in range(3)]
    assert sum(source_only) / 3 < 0.93
    assert min(adapted) > 0.95
