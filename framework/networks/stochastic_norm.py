"""Stochastic normalisation (Kou et al., NeurIPS 2020): a batch norm whose channels take turns with two statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from framework.errors import ConfigurationError


class StochasticNorm(_BatchNorm):
    """A batch norm that normalises each channel by its batch's statistics or by the running ones, by chance.

    In training, each forward draws for each channel whether it is normalised by the running statistics, as they were
    before this batch, with ``probability``, or by the batch's, through which gradients flow. The running statistics
    are updated as in any batch norm, which this one is in evaluation mode. Parameters and buffers are those of
    ``original``, and so are their names: state dicts fit both.

    The draws come from the default generator of the input's device. Processes draw for themselves, and DDP gives all
    of them the running statistics of the first before each forward.

    Shape: ``[N, C]`` or ``[N, C, ...]``, and the same out.

    Args:
        original: the batch norm that this one takes the place of; it must have running statistics. timm's, which end
            in a dropout and an activation, keep them.
        probability: of the running statistics. In the paper's code and TLlib ``p`` is that of the batch's; with 0.5
            the two are the same. 0 is batch norm.

    Raises:
        ConfigurationError: a probability outside [0, 1], or a batch norm whose forward pass is not known.
    """

    def __init__(self, original: _BatchNorm, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ConfigurationError(f"Expected `--model.probability` to be in [0, 1], but got {probability}.")
        if not original.track_running_stats or not (_is_plain(original) or _has_activation(original)):
            raise ConfigurationError(
                "Expected `--model.backbone` with batch norms of torch or timm that track running statistics, but one "
                f"is {original}."
            )
        super().__init__(original.num_features, original.eps, original.momentum, original.affine, device="meta")
        # the tensors themselves, so that an optimizer that has the original's parameters has these
        self._parameters.update(original._parameters)
        self._buffers.update(original._buffers)
        self.probability = probability
        self.drop: nn.Module = original.drop if _has_activation(original) else nn.Identity()  # type: ignore[assignment]
        self.act: nn.Module = original.act if _has_activation(original) else nn.Identity()  # type: ignore[assignment]
        self.train(original.training)

    def _check_input_dim(self, input: Tensor) -> None:  # of the base class, which leaves it to its subclasses
        if input.dim() < 2:
            raise ValueError(f"Expected an input of shape [N, C, ...], but got {list(input.shape)}.")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]
        mean, variance = self.running_mean, self.running_var
        assert mean is not None and variance is not None  # noqa: PT018
        # copies: the update below changes them in place without a trace, and the gradient would be of other statistics
        by_running = F.batch_norm(input, mean.clone(), variance.clone(), self.weight, self.bias, eps=self.eps)
        by_batch = super().forward(input)
        chosen = torch.rand(self.num_features, device=input.device) < self.probability
        chosen = chosen.view(-1, *[1] * (input.dim() - 2))
        return self.act(self.drop(torch.where(chosen, by_running, by_batch)))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, probability={self.probability}"  # type: ignore[no-untyped-call]


def convert_stochastic(module: nn.Module, probability: float = 0.5) -> nn.Module:
    """Replace every batch norm in ``module`` by a :class:`StochasticNorm` with the same tensors, in place.

    Returns ``module``, or its replacement if it is itself a batch norm. A batch norm without running statistics stays,
    and so does a :class:`StochasticNorm`. A batch norm that is used in several places stays one.
    """
    return _convert(module, probability, {})


def _convert(module: nn.Module, probability: float, converted: dict[nn.Module, nn.Module]) -> nn.Module:
    if isinstance(module, StochasticNorm):
        return module
    if isinstance(module, _BatchNorm):
        if not module.track_running_stats:
            return module
        return converted.setdefault(module, StochasticNorm(module, probability))
    for name, child in module._modules.items():  # named_children() would skip the second use of a shared module
        if child is not None:
            module._modules[name] = _convert(child, probability, converted)
    return module


def _is_plain(norm: _BatchNorm) -> bool:
    return type(norm).forward is _BatchNorm.forward


def _has_activation(norm: _BatchNorm) -> bool:
    """Whether this is timm's ``BatchNormAct2d`` (which need not be installed)."""
    return any(cls.__name__ == "BatchNormAct2d" for cls in type(norm).__mro__)
