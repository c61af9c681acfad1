"""Gradient checkpointing: blocks that are computed again in the backward pass, to save memory (Chen et al. 2016,
arXiv:1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from framework.errors import ConfigurationError
from framework.networks.batch_norm import DomainSpecificBatchNorm
from framework.networks.stages import split_stages
from framework.networks.stochastic_norm import StochasticNorm

FEWEST_LAYERS = 2  # a single convolution keeps its input either way


def checkpoint_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Make each block of a backbone keep its inputs alone, and compute the rest again when its gradient is due.

    Results are those without: what is drawn at random is drawn alike, batch norms normalise alike and update their
    running statistics once, also where several passes over several domains come before the gradient. Names in the
    state dict stay. Each block has a second forward pass in a training step. What the graph keeps, and the time of
    forward and backward pass, on a CPU:

    ==============================  ========  ========  =====
    network, pixels, images         kept MiB  before    time
    ==============================  ========  ========  =====
    ResNet-20, 32 px, 32 images           14        46    1.5
    ResNet-110, 32 px, 32 images          67       256   1.35
    ResNet-50, 224 px, 4 images          119       328   1.36
    ==============================  ========  ========  =====

    Blocks are found in the stages of :func:`~framework.networks.split_stages`: what a sequence of like modules is made
    of, such as residual, inverted residual, ConvNeXt or transformer blocks, and else the stage as a whole (a dense
    block of DenseNet); each has at least two layers. Modules inside may be replaced afterwards, by domain-specific
    batch norm for example. A hook on a module inside of a block runs in both passes.

    Returns:
        The blocks.

    Raises:
        ConfigurationError: fewer than two blocks, as in VGG and AlexNet, which are single layers.
    """
    names = dict.fromkeys(module for stage in split_stages(backbone) for module in stage.modules)
    blocks = [block for module in names for block in _blocks(module)]
    if len(blocks) < 2:
        raise ConfigurationError(
            "Expected `--model.gradient_checkpointing` to be false for a `--model.backbone` that is not made of blocks "
            f"of several layers, as {type(backbone).__name__}, but got true."
        )
    for block in blocks:
        # in the place of the class's: a wrapper module would change the names
        block.forward = _Recomputed(block)
    return blocks


def _blocks(module: nn.Module) -> list[nn.Module]:
    if _layers(module) < FEWEST_LAYERS:
        return []
    if _is_sequence(module):
        return [block for child in module.children() for block in _blocks(child)] or [module]
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList) and _is_chain(child):
            return [block for item in module.children() for block in _blocks_of_part(item)]
    return [module]


def _blocks_of_part(part: nn.Module) -> list[nn.Module]:
    # a list of modules is never called itself
    return [b for item in part for b in _blocks(item)] if isinstance(part, nn.ModuleList) else _blocks(part)


def _is_chain(sequence: nn.Sequential | nn.ModuleList) -> bool:
    """Whether these are the blocks of a stage, as ConvNeXt's and Swin's of timm; a block has unlike layers in it."""
    layered = [item for item in sequence if _layers(item)]
    is_like = len({type(item) for item in layered}) == 1
    return is_like and len(layered) > 1 and all(_layers(i) >= FEWEST_LAYERS and not _is_sequence(i) for i in layered)


def _is_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _layers(module: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in module.parameters())


class _Recomputed:
    """The forward pass of a block; an object, so that a copy of the block takes one of its own along."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        forward = functools.partial(type(self.module).forward, self.module)
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        if torch.compiler.is_compiling():  # the compiler computes values again, not the calls that change something
            return checkpoint(forward, *inputs, use_reentrant=False, **options)
        state = _State(self.module, inputs)
        outputs = checkpoint(
            forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), state.restored()), **options
        )
        state.check_inputs()
        return outputs


class _State:
    """What a block's forward pass depends on besides its inputs, as it was at the first pass."""

    def __init__(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.inputs = [(value, value._version) for value in inputs if isinstance(value, Tensor)]
        self.attributes: list[tuple[nn.Module, str, Any]] = []
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []  # their values may be read
        self.written: list[tuple[nn.Module, str]] = []
        for module in block.modules():
            names = ["training"]
            if isinstance(module, DomainSpecificBatchNorm):
                names.append("domain")
            elif isinstance(module, _BatchNorm):
                names.append("track_running_stats")
            self.attributes += [(module, name, getattr(module, name)) for name in names]
            only_written = isinstance(module, _BatchNorm) and module.training and not isinstance(module, StochasticNorm)
            for name, value in module._buffers.items():
                if value is None:
                    continue
                if only_written or not value.is_floating_point():  # of integers: counts and tables
                    self.written.append((module, name))
                else:
                    self.buffers.append((module, name, value.clone()))

    def check_inputs(self) -> None:
        """Refuse a block that changes what it was given, or whose inputs were changed since."""
        for value, version in self.inputs:
            if value._version != version:
                raise ConfigurationError(
                    "Expected `--model.gradient_checkpointing` to be false for this `--model.backbone`, which changes "
                    "the input of a block in place, but got true."
                )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The block as it was, for the second pass, which leaves no trace: what it writes into buffers is lost."""
        self.check_inputs()
        attributes = [(module, name, getattr(module, name)) for module, name, _ in self.attributes]
        scratch = [(module, name, module._buffers[name].clone()) for module, name in self.written]  # type: ignore[union-attr]
        buffers = [(module, name, module._buffers[name]) for module, name, _ in (*scratch, *self.buffers)]
        for module, name, value in self.attributes:
            setattr(module, name, value)
        for module, name, value in (*scratch, *self.buffers):
            module._buffers[name] = value
        try:
            yield
        finally:
            for module, name, value in attributes:
                setattr(module, name, value)
            for module, name, buffer in buffers:
                module._buffers[name] = buffer
