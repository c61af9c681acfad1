"""Conditional domain-adversarial training: the discriminator sees the features together with the predictions.

Long et al., "Conditional Adversarial Domain Adaptation", NeurIPS 2018, arXiv:1705.10667.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import full_precision, multilinear_map, prediction_entropy, randomized_multilinear_map
from framework.modules.adaptation.base import DomainAdaptation
from framework.modules.adaptation.dann import (
    AdversarialLoss,
    DomainWeighting,
    Normalization,
    ReversalSchedule,
    SourceLabel,
    one_of,
)
from framework.networks import NetworkOutputs

EntropyNormalization = Literal["per_domain", "joint", "none"]

LARGEST_FULL_MAP = 4096  # section 3.2: beyond it the paper randomises
RANDOMIZED_FEATURES = 1024  # the authors' code


@full_precision
def certainty_weights(
    source_logits: Tensor, target_logits: Tensor, normalization: EntropyNormalization
) -> tuple[Tensor, Tensor]:
    """``1 + exp(-entropy)`` of each image's prediction, between 1 and 2: certain images weigh more (section 3.3).

    Args:
        source_logits: shape ``[N, K]``.
        target_logits: shape ``[M, K]``.
        normalization: ``per_domain`` divides by the mean of the domain (the authors' code); ``joint`` by the mean of
            the two domains' means (TLlib), so that a domain of uncertain predictions weighs less; ``none`` leaves the
            weights as the paper's equation has them, which makes the loss up to twice as strong.

    Returns:
        Shapes ``[N]`` and ``[M]``.
    """
    source, target = (1 + torch.exp(-prediction_entropy(logits)) for logits in (source_logits, target_logits))
    if normalization == "per_domain":
        return source / source.mean(), target / target.mean()
    if normalization == "joint":
        mean = (source.mean() + target.mean()) / 2
        return source / mean, target / mean
    return source, target


class ConditionalDomainAdversarialLoss(AdversarialLoss):
    """Loss of a discriminator of features times predictions, behind a gradient reversal (Long 2018, section 3.3).

    No gradient flows into the predictions, as in the published codes: the features alone are turned against the
    discriminator. Diagnostics: ``domain_loss`` (nats per image; log 2 = 0.69 where the discriminator guesses),
    ``domain_accuracy`` (0.5 where it guesses), both without weights, and ``reversal_coefficient``; with entropy
    conditioning also ``source_certainty`` and ``target_certainty``, the means of ``exp(-entropy)`` (1/K where the
    classifier guesses, 1 where it is certain), and ``effective_share``, the effective number of images
    ``(sum w)^2 / sum w^2`` over their number (never below 8/9).

    Args:
        num_features: width ``D`` of the features.
        num_classes: number of classes ``K``.
        randomized_features: width of the randomised map of features and predictions; 0 for the outer product itself,
            of width ``D * K``; None for the paper's rule: randomised to 1024 where ``D * K`` is above 4096.
        entropy_conditioning: weigh images by the certainty of their predictions (CDAN+E).
        entropy_normalization: of these weights, see :func:`certainty_weights`. The paper has an expectation over
            each domain, which the authors' code takes with weights that sum to 1 there: ``per_domain``.
        hidden_features: width of the discriminator's two hidden layers.
        normalization: in the discriminator: ``batch`` (TLlib), ``dropout`` (the authors' code) or ``none``.
        domain_weighting: ``mean`` of the two domains' mean losses (the authors' code) or their ``sum`` (as
            the paper writes it).
        source_label: 1 or 0; learns the same.
        reversal_schedule: ``sigmoid`` (section 4.1), ``linear`` or ``constant``.
        reversal_gamma: steepness of the sigmoid ``2 / (1 + exp(-gamma * progress)) - 1``.
        reversal_maximum: what the coefficient is multiplied by.
    """

    term = "cdan"

    feature_map: Tensor
    probability_map: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        randomized_features: int | None = None,
        entropy_conditioning: bool = False,
        entropy_normalization: EntropyNormalization = "per_domain",
        hidden_features: int = 1024,
        normalization: Normalization = "batch",
        domain_weighting: DomainWeighting = "mean",
        source_label: SourceLabel = 1,
        reversal_schedule: ReversalSchedule = "sigmoid",
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 1.0,
    ) -> None:
        product = num_features * num_classes
        if randomized_features is None:
            randomized_features = RANDOMIZED_FEATURES if product > LARGEST_FULL_MAP else 0
        if randomized_features < 0:
            raise ConfigurationError(
                f"Expected `--model.randomized_features` to be 0 or more, or none, but got {randomized_features}."
            )
        one_of("--model.entropy_normalization", entropy_normalization, get_args(EntropyNormalization))
        super().__init__(
            randomized_features or product,
            hidden_features=hidden_features,
            normalization=normalization,
            domain_weighting=domain_weighting,
            source_label=source_label,
            reversal_schedule=reversal_schedule,
            reversal_gamma=reversal_gamma,
            reversal_maximum=reversal_maximum,
        )
        self.randomized_features = randomized_features
        self.entropy_conditioning, self.entropy_normalization = entropy_conditioning, entropy_normalization
        if randomized_features:  # drawn once; in the state dict, so that a resumed run goes on with the same
            self.register_buffer("feature_map", torch.randn(num_features, randomized_features))
            self.register_buffer("probability_map", torch.randn(num_classes, randomized_features))

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The discriminator's loss, a scalar; its gradient reaches the features reversed, and the logits not at all."""
        source_logits, target_logits = source.logits.detach(), target.logits.detach()
        features = self.reverse(source, target, progress)
        conditioned = self.condition(features, torch.cat([source_logits, target_logits])).to(features.dtype)
        weights = None
        if self.entropy_conditioning:
            weights = certainty_weights(source_logits, target_logits, self.entropy_normalization)
            self.measure(source_logits, target_logits, torch.cat(weights))
        return self.domain_loss(self.discriminator(conditioned), len(source_logits), weights)

    @full_precision
    def condition(self, features: Tensor, logits: Tensor) -> Tensor:
        """What the discriminator sees, ``[N, D * K]`` or ``[N, randomized_features]``, in float32 or float64."""
        probabilities = logits.softmax(dim=1)
        if not self.randomized_features:
            return multilinear_map(features, probabilities)
        return randomized_multilinear_map(features, probabilities, self.feature_map, self.probability_map)

    def measure(self, source_logits: Tensor, target_logits: Tensor, weights: Tensor) -> None:
        """Diagnostics of the entropy conditioning."""
        self.diagnostics["source_certainty"] = torch.exp(-prediction_entropy(source_logits)).mean()
        self.diagnostics["target_certainty"] = torch.exp(-prediction_entropy(target_logits)).mean()
        self.diagnostics["effective_share"] = weights.mean().square() / weights.square().mean()


class CDAN(DomainAdaptation):
    """Conditional domain-adversarial network (Long et al., NeurIPS 2018); CDAN+E with ``entropy_conditioning``.

    Args:
        num_classes: number of classes ``K``.
        randomized_features: width of the randomised map of features and predictions; 0 for their outer product, of
            width ``bottleneck_features * num_classes``; None for the paper's rule: randomised to 1024 where that is
            above 4096.
        entropy_conditioning: weigh images by ``1 + exp(-entropy)`` of their predictions (CDAN+E).
        entropy_normalization: of these weights: ``per_domain`` (the authors' code), ``joint`` (TLlib) or ``none``.
        discriminator_features: width of the discriminator's two hidden layers.
        discriminator_normalization: ``batch``, ``dropout`` or ``none``.
        domain_weighting: ``mean`` of the two domains' mean losses (the authors' code) or their ``sum``.
        source_label: the discriminator's name for the source, 1 or 0; learns the same.
        reversal_schedule: of the reversal coefficient: ``sigmoid`` (the paper), ``linear`` or ``constant``.
        reversal_gamma: steepness of the sigmoid.
        reversal_maximum: the coefficient's final value.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        randomized_features: int | None = None,
        entropy_conditioning: bool = False,
        entropy_normalization: EntropyNormalization = "per_domain",
        discriminator_features: int = 1024,
        discriminator_normalization: Normalization = "batch",
        domain_weighting: DomainWeighting = "mean",
        source_label: SourceLabel = 1,
        reversal_schedule: ReversalSchedule = "sigmoid",
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.alignment = ConditionalDomainAdversarialLoss(
            self.num_features,
            num_classes,
            randomized_features=randomized_features,
            entropy_conditioning=entropy_conditioning,
            entropy_normalization=entropy_normalization,
            hidden_features=discriminator_features,
            normalization=discriminator_normalization,
            domain_weighting=domain_weighting,
            source_label=source_label,
            reversal_schedule=reversal_schedule,
            reversal_gamma=reversal_gamma,
            reversal_maximum=reversal_maximum,
        )
