"""Adaptive feature norm: features of both domains with larger norms.

Xu et al., "Larger Norm More Transferable: An Adaptive Feature Norm Approach for Unsupervised Domain Adaptation", ICCV
2019, arXiv:1811.07456.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

from framework.errors import ConfigurationError, at_least_zero
from framework.functional import full_precision, prediction_entropy
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs

Variant = Literal["stepwise", "hard"]


class AdaptiveFeatureNormLoss(AlignmentLoss):
    """Pulls the norms of the features outwards, the sum over both domains of one of these (Xu 2019).

    ``stepwise`` (SAFN): the mean of ``(|f| - (|f| + step))^2`` with the bracket held fixed. Its value is always
    ``step^2``, its gradient ``-2 step`` along each feature. ``hard`` (HAFN): ``(mean |f| - radius)^2``.

    Diagnostics: ``source_norm`` and ``target_norm``, the mean norms, which should grow together; with an entropy weight
    also ``target_entropy``, the mean entropy of the predictions in nats.

    Args:
        variant: ``stepwise`` or ``hard``.
        step: by how much stepwise norms should grow.
        radius: the mean norm that the hard variant asks for.
        entropy_weight: adds this times the mean entropy of the target's predictions.
    """

    term = "afn"

    def __init__(
        self, variant: Variant = "stepwise", step: float = 1.0, radius: float = 25.0, entropy_weight: float = 0.0
    ) -> None:
        super().__init__()
        if variant not in ("stepwise", "hard"):
            raise ConfigurationError(f"Expected `--model.variant` to be 'stepwise' or 'hard', but got {variant!r}.")
        at_least_zero("--model.step", step)
        at_least_zero("--model.radius", radius)
        at_least_zero("--model.entropy_weight", entropy_weight)
        self.variant, self.step, self.radius, self.entropy_weight = variant, step, radius, entropy_weight

    @full_precision
    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The loss, a scalar; ``progress`` plays no part."""
        source_norms, target_norms = source.features.norm(dim=1), target.features.norm(dim=1)
        self.diagnostics = {"source_norm": source_norms.detach().mean(), "target_norm": target_norms.detach().mean()}
        loss = self._of(source_norms) + self._of(target_norms)
        if self.entropy_weight:
            entropy = prediction_entropy(target.logits).mean()
            self.diagnostics["target_entropy"] = entropy.detach()
            loss = loss + self.entropy_weight * entropy
        return loss

    def _of(self, norms: Tensor) -> Tensor:
        if self.variant == "hard":
            return (norms.mean() - self.radius).square()
        return (norms - (norms.detach() + self.step)).square().mean()


class AFN(DomainAdaptation):
    """Adaptive feature norm (Xu et al., ICCV 2019).

    Dropout of the bottleneck keeps the expected square of the norm, as the paper's does, and not the expected feature:
    dropped features are scaled by ``1 / sqrt(1 - p)``. Else all norms would be larger in training than after it.

    Args:
        num_classes: number of classes ``K``.
        trade_off: weight of the alignment loss: 0.05 in the paper.
        variant: ``stepwise`` (SAFN) or ``hard`` (HAFN).
        step: by how much stepwise norms should grow.
        radius: the mean norm that the hard variant asks for.
        entropy_weight: of the target's mean entropy beside the norms; ``trade_off`` multiplies it too.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        trade_off: float = 0.05,
        variant: Variant = "stepwise",
        step: float = 1.0,
        radius: float = 25.0,
        entropy_weight: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, trade_off=trade_off, **options)
        self.alignment = AdaptiveFeatureNormLoss(variant, step, radius, entropy_weight)
        self.kept = 1 - sum(layer.p for layer in self.bottleneck.modules() if isinstance(layer, nn.Dropout))

    def outputs(self, images: Tensor) -> NetworkOutputs:
        """Features and logits, behind the dropout that keeps norms."""
        features = self.bottleneck(self.backbone(images))
        if self.training:
            features = features * math.sqrt(self.kept)
        return NetworkOutputs(features, self.head(features))
