"""Margin disparity discrepancy: an adversarial classifier that agrees with the head on the source only.

Zhang et al., "Bridging Theory and Algorithm for Domain Adaptation", ICML 2019, arXiv:1904.05801.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.errors import ConfigurationError, at_least_zero, in_range
from framework.functional import reversal_coefficient, reverse_gradient
from framework.functional.precision import full_precision
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import MLPHead, NetworkOutputs


class MarginDisparityDiscrepancyLoss(AlignmentLoss):
    """The negative of the margin disparity discrepancy (Zhang 2019, section 5.2), behind a gradient reversal.

    With ``c`` the class that the head predicts and ``p`` the adversarial classifier's probabilities it is
    ``margin * mean over the source of -log p[c]  -  mean over the target of log(1 - p[c])``. The adversary minimises
    it: it learns to repeat the head on the source and to contradict it on the target. The reversed gradient teaches the
    features the opposite. The head itself gets no gradient: it counts by its predictions only.

    Diagnostics: ``source_agreement`` and ``target_agreement``, the mean of ``p[c]``: where the features of the domains
    are alike, both settle at ``margin / (1 + margin)``, 0.8 by default; ``margin_disparity``, the
    discrepancy; and ``reversal_coefficient``.

    Args:
        num_features: width ``D`` of the features.
        num_classes: number of classes ``K``.
        classifier_features: width of the adversarial classifier's hidden layer.
        classifier_dropout: dropout probability after it.
        margin: the factor gamma of the source, ``exp`` of the margin rho.
        reversal_gamma: steepness of the reversal coefficient ``2 / (1 + exp(-gamma * progress)) - 1``.
        reversal_maximum: what the coefficient is multiplied by.
    """

    term = "mdd"

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        classifier_features: int = 1024,
        classifier_dropout: float = 0.5,
        margin: float = 4.0,
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 0.1,
    ) -> None:
        super().__init__()
        self.classifier = MLPHead(num_features, num_classes, classifier_features, classifier_dropout)
        self.margin = margin
        self.reversal_gamma, self.reversal_maximum = reversal_gamma, reversal_maximum

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The adversary's loss, a scalar; its gradient reaches the features reversed."""
        coefficient = reversal_coefficient(progress, self.reversal_gamma, self.reversal_maximum)
        features = torch.cat([source.features, target.features])
        logits = self.classifier(reverse_gradient(features, coefficient))
        loss, self.diagnostics = _negative_disparity(
            logits[: len(source.features)],
            source.logits.argmax(dim=1),
            logits[len(source.features) :],
            target.logits.argmax(dim=1),
            self.margin,
        )
        self.diagnostics["reversal_coefficient"] = coefficient
        return loss

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """Where the adversary contradicts the head on the target at will, the features are not aligned."""
        source, target = means.get("train/source_agreement", 1.0), means.get("train/target_agreement", 1.0)
        if progress >= 0.5 and source - target > 0.6:
            yield (
                "mdd",
                f"the adversarial classifier agrees with the head on the source ({source:.2f}, "
                f"`train/source_agreement`) and hardly on the target ({target:.2f}, `train/target_agreement`), so the "
                "features are not aligned. Raise `--model.reversal_maximum` or `--model.trade_off`.",
            )


@full_precision
def _negative_disparity(
    source_logits: Tensor, source_classes: Tensor, target_logits: Tensor, target_classes: Tensor, margin: float
) -> tuple[Tensor, dict[str, Tensor]]:
    source_log = -F.cross_entropy(source_logits, source_classes, reduction="none")  # log p[c]
    # log(1 - p[c]) = log of the sum over the other classes: no 1 - 1 where p[c] is near 1, and no clamp
    predicted = F.one_hot(target_classes, target_logits.shape[1]).bool()
    others = target_logits.masked_fill(predicted, -torch.inf).logsumexp(dim=1) - target_logits.logsumexp(dim=1)
    loss = -margin * source_log.mean() - others.mean()
    diagnostics = {
        "margin_disparity": -loss.detach(),
        "source_agreement": source_log.detach().exp().mean(),
        "target_agreement": 1.0 - others.detach().exp().mean(),
    }
    return loss, diagnostics


class MDD(DomainAdaptation):
    """Margin disparity discrepancy (Zhang et al., ICML 2019).

    The paper has a hidden layer in the head too; here the head is the base's linear one.

    Args:
        num_classes: number of classes ``K``.
        classifier_features: width of the adversarial classifier's hidden layer.
        classifier_dropout: dropout probability after it.
        margin: gamma, the factor of the source in the discrepancy.
        reversal_gamma: steepness of the schedule of the reversal coefficient.
        reversal_maximum: its final value.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        classifier_features: int = 1024,
        classifier_dropout: float = 0.5,
        margin: float = 4.0,
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        at_least_zero("--model.classifier_features", classifier_features)
        in_range("--model.classifier_dropout", classifier_dropout, 0, 1)
        at_least_zero("--model.reversal_gamma", reversal_gamma)
        at_least_zero("--model.reversal_maximum", reversal_maximum)
        if margin <= 0:
            raise ConfigurationError(f"Expected `--model.margin` to be above 0, but got {margin}.")
        self.alignment = MarginDisparityDiscrepancyLoss(
            self.num_features,
            num_classes,
            classifier_features=classifier_features,
            classifier_dropout=classifier_dropout,
            margin=margin,
            reversal_gamma=reversal_gamma,
            reversal_maximum=reversal_maximum,
        )
