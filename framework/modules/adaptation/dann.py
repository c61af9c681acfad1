"""Domain-adversarial training: features from which a discriminator cannot tell the domains apart.

Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import reversal_coefficient, reverse_gradient
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.modules.base import at_least_zero
from framework.networks import DomainDiscriminator, NetworkOutputs


class DomainAdversarialLoss(AlignmentLoss):
    """Loss of a domain discriminator behind a gradient reversal (Ganin 2016, eq. 9 and 18).

    The discriminator learns to tell source (label 1) from target (label 0); the reversed gradient teaches the features
    the opposite. Diagnostics: ``domain_loss`` (nats per image; log 2 = 0.69 where the discriminator guesses),
    ``domain_accuracy`` (0.5 where it guesses) and ``reversal_coefficient``.

    Args:
        num_features: width ``D`` of the features.
        hidden_features: width of the discriminator's two hidden layers.
        normalization: in the discriminator: ``batch``, ``dropout`` or ``none``.
        domain_weighting: ``sum`` adds the mean losses of the two domains (the paper), ``mean`` halves that (CDAN's
            code and its successors).
        reversal_gamma: steepness of the reversal coefficient ``2 / (1 + exp(-gamma * progress)) - 1`` (eq. 14).
        reversal_maximum: what the coefficient is multiplied by.
    """

    term = "dann"

    def __init__(
        self,
        num_features: int,
        *,
        hidden_features: int = 1024,
        normalization: Literal["batch", "dropout", "none"] = "batch",
        domain_weighting: Literal["sum", "mean"] = "sum",
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 1.0,
    ) -> None:
        super().__init__()
        self.discriminator = DomainDiscriminator(num_features, hidden_features, normalization)
        self.weight = {"sum": 1.0, "mean": 0.5}[domain_weighting]
        self.reversal_gamma, self.reversal_maximum = reversal_gamma, reversal_maximum

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The discriminator's loss, a scalar; its gradient reaches the features reversed."""
        coefficient = reversal_coefficient(progress, self.reversal_gamma, self.reversal_maximum)
        features = torch.cat([source.features, target.features])
        logits = self.discriminator(reverse_gradient(features, coefficient)).float()
        source_logits, target_logits = logits[: len(source.features)], logits[len(source.features) :]
        # -log sigmoid(z) and -log(1 - sigmoid(z))
        source_loss, target_loss = F.softplus(-source_logits).mean(), F.softplus(target_logits).mean()
        self.diagnostics = {
            "domain_loss": (source_loss + target_loss).detach() / 2,
            "domain_accuracy": ((source_logits > 0).float().mean() + (target_logits <= 0).float().mean()) / 2,
            "reversal_coefficient": coefficient,
        }
        return self.weight * (source_loss + target_loss)


class DANN(DomainAdaptation):
    """Domain-adversarial neural network (Ganin et al., JMLR 2016).

    Args:
        num_classes: number of classes ``K``.
        discriminator_features: width of the discriminator's two hidden layers.
        discriminator_normalization: ``batch``, ``dropout`` or ``none``.
        domain_weighting: ``sum`` of the two domains' mean losses (the paper) or their ``mean``.
        reversal_gamma: steepness of the schedule of the reversal coefficient.
        reversal_maximum: its final value.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        discriminator_features: int = 1024,
        discriminator_normalization: Literal["batch", "dropout", "none"] = "batch",
        domain_weighting: Literal["sum", "mean"] = "sum",
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        at_least_zero("--model.reversal_gamma", reversal_gamma)
        at_least_zero("--model.reversal_maximum", reversal_maximum)
        if domain_weighting not in ("sum", "mean"):
            raise ConfigurationError(
                f"Expected `--model.domain_weighting` to be 'sum' or 'mean', but got {domain_weighting!r}."
            )
        self.alignment = DomainAdversarialLoss(
            self.num_features,
            hidden_features=discriminator_features,
            normalization=discriminator_normalization,
            domain_weighting=domain_weighting,
            reversal_gamma=reversal_gamma,
            reversal_maximum=reversal_maximum,
        )
