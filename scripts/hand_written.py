"""Training loops as one would write them by hand for one method: plain PyTorch, nothing measured, nothing logged.

What the benchmark of a step compares the framework with. The networks are copies of a module's own, so that both
compute the same loss; the losses are written out here, not taken from the framework.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_losses import gram_mk_mmd
from measuring import DEVICE
from torch import Tensor

from framework.batch import DomainBatch


class ReversedGradient(torch.autograd.Function):
    """The identity, with a gradient times ``-coefficient``."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, coefficient: float) -> Tensor:
        """The features."""
        ctx.coefficient = coefficient
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The reversed gradient."""
        return -ctx.coefficient * gradient, None


def coefficient(progress: float) -> float:
    """Ganin's schedule of the reversal."""
    return 2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0


def dann(module: Any, features: Tensor, logits: Tensor, count: int, progress: float) -> Tensor:
    """Two mean cross-entropies of the discriminator."""
    loss = module.alignment
    judged = loss.discriminator(ReversedGradient.apply(features, coefficient(progress)))
    return loss.domain_factor * (F.softplus(-judged[:count]).mean() + F.softplus(judged[count:]).mean())


def cdan(module: Any, features: Tensor, logits: Tensor, count: int, progress: float) -> Tensor:
    """The discriminator sees features times predictions, by the randomised map where the module has one."""
    reversed_features = ReversedGradient.apply(features, coefficient(progress))
    predictions = logits.detach().softmax(1)
    loss = module.alignment
    if loss.randomized_features:
        seen = (reversed_features @ loss.feature_map) * (predictions @ loss.probability_map)
        seen = seen / math.sqrt(loss.randomized_features)
    else:
        seen = (reversed_features[:, :, None] * predictions[:, None, :]).flatten(1)
    judged = loss.discriminator(seen)
    return loss.domain_factor * (F.softplus(-judged[:count]).mean() + F.softplus(judged[count:]).mean())


def dan(module: Any, features: Tensor, logits: Tensor, count: int, progress: float) -> Tensor:
    """Five kernels on one Gram matrix, in float32."""
    with torch.autocast(features.device.type, enabled=False):
        return gram_mk_mmd(features[:count].float(), features[count:].float())


def mcc(module: Any, features: Tensor, logits: Tensor, count: int, progress: float) -> Tensor:
    """Class confusion of the target's predictions."""
    scaled = logits[count:] / module.alignment.temperature
    predictions = scaled.softmax(1)
    with torch.no_grad():
        weights = 1.0 + (predictions * scaled.log_softmax(1)).sum(1).exp()
        weights = len(weights) * weights / weights.sum()
    confusion = predictions.T @ (weights[:, None] * predictions)
    confusion = confusion / confusion.sum(1, keepdim=True)
    return (confusion.sum() - confusion.trace()) / len(confusion)


def source_only(module: Any, features: Tensor, logits: Tensor, count: int, progress: float) -> Tensor:
    """Nothing of the target."""
    return features.new_zeros(())


Alignment = Callable[[Any, Tensor, Tensor, int, float], Tensor]
ALIGNMENTS: dict[str, Alignment] = {"dann": dann, "cdan": cdan, "dan": dan, "mcc": mcc, "source_only": source_only}


class Loop:
    """A training loop on a copy of a module's networks.

    Args:
        module: of the framework, not yet trained.
        alignment: the method's loss.
        steps: of the whole run, for the schedule of the reversal.
        two_forwards: a forward for each domain, in place of one of both.
        bfloat16: forward and losses under autocast.
    """

    def __init__(
        self, module: Any, alignment: Alignment, steps: int, two_forwards: bool = False, bfloat16: bool = False
    ) -> None:
        self.module = copy.deepcopy(module).to(DEVICE).train()
        self.alignment, self.steps, self.two_forwards, self.bfloat16 = alignment, steps, two_forwards, bfloat16
        self.trade_off = float(getattr(module, "trade_off", 0.0))
        groups = self.module.parameter_groups()
        self.optimizer = module.optimizer_class(groups, **(module.optimizer_arguments | {"fused": True}))
        self.step_number = 0

    def features(self, images: Tensor) -> Tensor:
        """Of the layer that is aligned."""
        found: Tensor = self.module.bottleneck(self.module.backbone(images))
        return found

    def loss(self, batch: DomainBatch) -> Tensor:
        """Cross-entropy of the source plus the alignment."""
        source, target = batch.source.images, batch.target
        if self.two_forwards:
            features = torch.cat([self.features(source), self.features(target)])
        else:
            features = self.features(torch.cat([source, target]))
        logits = self.module.head(features)
        progress = min(1.0, self.step_number / self.steps)
        aligned = self.alignment(self.module, features, logits, len(source), progress)
        return F.cross_entropy(logits[: len(source)], batch.source.labels) + self.trade_off * aligned

    def __call__(self, batch: DomainBatch) -> Tensor:
        """One step."""
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.step_number += 1
        return loss


class Bare:
    """What every method contains: forward of both domains, cross-entropy, backward; no optimizer."""

    def __init__(self, module: Any, bfloat16: bool = False) -> None:
        self.module, self.bfloat16 = copy.deepcopy(module).to(DEVICE).train(), bfloat16

    def __call__(self, batch: DomainBatch) -> Tensor:
        """One step."""
        for parameter in self.module.parameters():
            parameter.grad = None
        count = len(batch.source.images)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.module(torch.cat([batch.source.images, batch.target]))[:count]
            loss = F.cross_entropy(logits, batch.source.labels)
        loss.backward()
        return loss
