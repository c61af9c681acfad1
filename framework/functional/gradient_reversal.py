"""The gradient reversal layer of domain-adversarial training, as a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framework.errors import ConfigurationError


def reverse_gradient(features: Tensor, coefficient: Tensor) -> Tensor:
    """The features forward, ``-coefficient`` times the gradient backward (Ganin et al. 2016, sec. 4.2).

    Between a feature extractor and a domain discriminator it turns the minimax problem into one loss: the
    discriminator descends it, the extractor ascends it.

    Args:
        features: any shape and floating dtype; returned as a view of themselves.
        coefficient: 0-d tensor, usually ``reversal_coefficient(progress)``. A tensor and not a number, so that one
            compiled graph serves all its values. It gets no gradient.

    Raises:
        ConfigurationError: ``coefficient`` is not a 0-d tensor.

    >>> features = torch.ones(2, requires_grad=True)
    >>> reverse_gradient(features, torch.tensor(0.5)).sum().backward()
    >>> features.grad
    tensor([-0.5000, -0.5000])
    """
    if not isinstance(coefficient, Tensor) or coefficient.ndim != 0:
        shape = f"shape {list(coefficient.shape)}" if isinstance(coefficient, Tensor) else repr(coefficient)
        raise ConfigurationError(f"Expected `coefficient` to be a 0-d tensor, but got {shape}.")
    reversed_features: Tensor = _GradientReversal.apply(features, coefficient)
    return reversed_features


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, coefficient: Tensor) -> Tensor:
        ctx.save_for_backward(coefficient)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (coefficient,) = ctx.saved_tensors
        return -coefficient * gradient, None  # a 0-d factor leaves the gradient's dtype as it is
