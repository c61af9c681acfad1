"""Domain-specific batch normalisation (Chang et al., CVPR 2019, arXiv:1906.03950).

With shared weights only the statistics are each domain's own, as in AdaBN (Li et al. 2016, arXiv:1603.04779).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from framework.errors import ConfigurationError

Domain = Literal["source", "target"]


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Every batch norm in ``module``, itself included; timm's and the synchronised ones are such."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within this context, training batches are normalised by their own statistics and leave the running ones alone.

    For images that evaluation will never see, such as rotated ones.
    """
    layers = [layer for layer in batch_norms(module) if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def own_statistics(module: nn.Module) -> Iterator[None]:
    """As :func:`running_statistics_kept`, in evaluation too."""
    layers = [layer for layer in batch_norms(module) if not layer.training]
    with running_statistics_kept(module):
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False


class DomainSpecificBatchNorm(nn.Module):
    """One batch norm per domain, each with its own statistics, scale and shift (Chang et al. 2019, section 4.2).

    Shapes are those of ``original``. Both start as copies of it, so that pretrained weights carry over to both.

    Args:
        original: what is copied.
        share_weights: give both the same scale and shift; the ``state_dict`` then names these twice.

    Attributes:
        source: the batch norm of the source domain.
        target: the batch norm of the target domain.
        domain: which of them ``forward`` uses; "target" until :func:`select_domain` says otherwise, so that inference
            and export use the target's. Not part of the ``state_dict``.
    """

    def __init__(self, original: _BatchNorm, share_weights: bool = False) -> None:
        super().__init__()
        self.source = copy.deepcopy(original)
        self.target = copy.deepcopy(original)
        if share_weights:
            self.target.weight, self.target.bias = self.source.weight, self.source.bias
        self.training = original.training
        self.domain: Domain = "target"

    def forward(self, inputs: Tensor) -> Tensor:
        normalized: Tensor = self.source(inputs) if self.domain == "source" else self.target(inputs)
        return normalized


def convert_domain_specific(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """Replace every batch norm in ``module`` by a :class:`DomainSpecificBatchNorm`, in place.

    With ``share_weights`` the domains' norms differ in their statistics alone. Returns ``module``, or its replacement
    if it is itself a batch norm. A second call changes nothing. A batch norm that is used in several places stays one.
    Build the optimizer afterwards: the parameters are new.
    """
    return _convert(module, share_weights, {})


def _convert(module: nn.Module, share_weights: bool, converted: dict[nn.Module, nn.Module]) -> nn.Module:
    if isinstance(module, DomainSpecificBatchNorm):
        return module
    if isinstance(module, _BatchNorm):
        return converted.setdefault(module, DomainSpecificBatchNorm(module, share_weights))
    for name, child in module._modules.items():  # named_children() would skip the second use of a shared module
        if child is not None:
            module._modules[name] = _convert(child, share_weights, converted)
    return module


def select_domain(module: nn.Module, domain: Domain) -> None:
    """Make every :class:`DomainSpecificBatchNorm` in ``module`` use the statistics and weights of ``domain``.

    Raises:
        ConfigurationError: ``domain`` is neither "source" nor "target".
    """
    if domain not in ("source", "target"):
        raise ConfigurationError(f"Expected `domain` to be 'source' or 'target', but got {domain!r}.")
    for child in module.modules():
        if isinstance(child, DomainSpecificBatchNorm):
            child.domain = domain
