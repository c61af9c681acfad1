"""A training step as pytorch-adapt has it, on copies of a module's own networks: what a benchmark can compare with.

The package is no dependency of this project; where it does not import there is no such form.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from measuring import DEVICE
from torch import Tensor, nn

from framework.batch import DomainBatch
from framework.functional import FIVE_SCALES


def dann(hooks: Any, layers: Any, optimizer: Any) -> Any:
    """The discriminator's loss behind a gradient reversal of a constant coefficient."""
    return hooks.DANNHook([optimizer])


def dan(hooks: Any, layers: Any, optimizer: Any) -> Any:
    """All pairs, five kernels, on a bandwidth of its own choice."""
    scales = torch.tensor([1.0 / (2.0 * scale) for scale in FIVE_SCALES], device=DEVICE)
    aligner = hooks.AlignerHook(layers.MMDLoss(kernel_scales=scales, mmd_type="quadratic"), layer="features")
    return hooks.AlignerPlusCHook([optimizer], aligner_hook=aligner, softmax=False)


def mcc(hooks: Any, layers: Any, optimizer: Any) -> Any:
    """Class confusion of the target's predictions."""
    return hooks.ClassifierHook([optimizer], post=[hooks.MCCHook(layers.MCCLoss(T=2.5))])


HOOKS: dict[str, Callable[[Any, Any, Any], Any]] = {"dann": dann, "dan": dan, "mcc": mcc}


def pytorch_adapt(method: str, module: Any, bfloat16: bool = False) -> Callable[[DomainBatch], Tensor] | None:
    """A step of a method, or None where pytorch-adapt has none of these hooks or does not import.

    Its hooks send each domain through the network by itself, weigh all losses alike, and read them back from the
    device in every step. With ``bfloat16`` the backward pass is under autocast too: a hook is the whole step.
    """
    if method not in HOOKS:
        return None
    try:
        hooks, layers = (importlib.import_module(f"pytorch_adapt.{part}") for part in ("hooks", "layers"))
    except Exception as error:  # with other versions of its dependencies it may raise anything
        print(f"no column for pytorch-adapt: {error!r}", file=sys.stderr)
        return None
    networks = copy.deepcopy(module).to(DEVICE).train()
    arguments = module.optimizer_arguments | {"fused": True}
    optimizer = module.optimizer_class(networks.parameter_groups(), **arguments)
    hook = HOOKS[method](hooks, layers, optimizer)
    models = {"G": nn.Sequential(networks.backbone, networks.bottleneck), "C": networks.head}
    if method == "dann":
        models["D"] = networks.alignment.discriminator

    def step(batch: DomainBatch) -> Tensor:
        source, labels, target = batch.source.images, batch.source.labels, batch.target
        inputs = {"src_imgs": source, "src_labels": labels, "target_imgs": target}
        domains = {"src_domain": torch.zeros_like(labels), "target_domain": labels.new_ones(len(target))}
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16):
            _, losses = hook(models | inputs | domains)
        return torch.tensor(sum(value for value in losses["total_loss"].values()))

    return step
