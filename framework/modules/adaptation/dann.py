"""Domain-adversarial training: features from which a discriminator cannot tell the domains apart.

Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.errors import ConfigurationError, at_least_zero
from framework.functional import full_precision, reversal_coefficient, reverse_gradient
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import DomainDiscriminator, NetworkOutputs

Normalization = Literal["batch", "dropout", "none"]
DomainWeighting = Literal["sum", "mean"]
SourceLabel = Literal[1, 0]
ReversalSchedule = Literal["sigmoid", "linear", "constant"]


@full_precision
def domain_cross_entropy(logits: Tensor, is_source: bool, source_label: int = 1) -> Tensor:
    """Cross-entropy, in nats, of a discriminator on images of one domain.

    Args:
        logits: any shape; positive where the discriminator says "label 1".
        is_source: whether the images are the source's.
        source_label: the source's label, 1 or 0; the target has the other.

    Returns:
        The shape of ``logits``.
    """
    # -log sigmoid(z) for label 1, -log(1 - sigmoid(z)) for label 0
    return F.softplus(-logits if is_source == (source_label == 1) else logits)


def domain_errors(logits: Tensor, is_source: bool, source_label: int = 1) -> Tensor:
    """1 where a discriminator takes an image for one of the other domain, else 0; the shape of ``logits``, float32."""
    wrong = logits <= 0 if is_source == (source_label == 1) else logits > 0
    return wrong.float()


class AdversarialLoss(AlignmentLoss):
    """What the losses with a domain discriminator share; not a loss by itself.

    A subclass hands :meth:`domain_loss` the discriminator's logits, of features that went through
    :meth:`reverse`. Diagnostics that it sets: ``domain_loss`` (nats per image; log 2 = 0.69 where the discriminator
    guesses) and ``domain_accuracy`` (0.5 where it guesses), both without weights, and ``reversal_coefficient``.

    Args:
        discriminated_features: width of what the discriminator sees.
        hidden_features: width of the discriminator's two hidden layers.
        normalization: in the discriminator: ``batch``, ``dropout`` or ``none``.
        domain_weighting: ``sum`` adds the mean losses of the two domains, ``mean`` halves that.
        source_label: what the discriminator calls the source, 1 or 0. A mirror image: nothing else changes.
        reversal_schedule: of the reversal coefficient over the progress ``p``: ``sigmoid``, ``2 / (1 + exp(-gamma p)) -
            1`` (Ganin 2016, eq. 14); ``linear``, ``p``; ``constant``, 1.
        reversal_gamma: steepness of the sigmoid.
        reversal_maximum: what the coefficient is multiplied by.
    """

    def __init__(
        self,
        discriminated_features: int,
        *,
        hidden_features: int,
        normalization: Normalization,
        domain_weighting: DomainWeighting,
        source_label: SourceLabel = 1,
        reversal_schedule: ReversalSchedule = "sigmoid",
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 1.0,
    ) -> None:
        super().__init__()
        at_least_one("--model.discriminator_features", hidden_features)
        one_of("--model.discriminator_normalization", normalization, get_args(Normalization))
        one_of("--model.domain_weighting", domain_weighting, get_args(DomainWeighting))
        one_of("--model.source_label", source_label, get_args(SourceLabel))
        one_of("--model.reversal_schedule", reversal_schedule, get_args(ReversalSchedule))
        at_least_zero("--model.reversal_gamma", reversal_gamma)
        at_least_zero("--model.reversal_maximum", reversal_maximum)
        self.discriminator = DomainDiscriminator(discriminated_features, hidden_features, normalization)
        self.domain_factor = {"sum": 1.0, "mean": 0.5}[domain_weighting]
        self.source_label = source_label
        self._known: tuple[tuple[Any, ...], tuple[Tensor, Tensor]] | None = None
        self.reversal_schedule = reversal_schedule
        self.reversal_gamma, self.reversal_maximum = reversal_gamma, reversal_maximum

    def coefficient(self, progress: Tensor) -> Tensor:
        """The reversal coefficient, a 0-d tensor."""
        if self.reversal_schedule == "sigmoid":
            return reversal_coefficient(progress, self.reversal_gamma, self.reversal_maximum)
        rise = progress.clamp(0.0, 1.0) if self.reversal_schedule == "linear" else torch.ones_like(progress)
        return self.reversal_maximum * rise

    def reverse(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """Features ``[N + M, D]`` of both domains, the source first, behind the gradient reversal."""
        coefficient = self.coefficient(progress)
        self.diagnostics = {"reversal_coefficient": coefficient}
        return reverse_gradient(torch.cat([source.features, target.features]), coefficient)

    @full_precision
    def domain_loss(self, logits: Tensor, source_count: int, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The discriminator's loss, a scalar.

        Args:
            logits: ``[N + M]``, the source's first.
            source_count: ``N``.
            weights: of the source's images ``[N]`` and of the target's ``[M]``; 1 by default.
        """
        share, wrong = self._known_constants(source_count, logits)
        against = logits * wrong
        losses = F.softplus(against)  # -log sigmoid(z) for label 1, -log(1 - sigmoid(z)) for label 0
        loss = torch.dot(losses, share)
        self.diagnostics = {
            **self.diagnostics,
            "domain_loss": loss.detach() * (0.5 / self.domain_factor),
            "domain_accuracy": 0.5 - torch.dot(against.detach().sign(), share) * (0.25 / self.domain_factor),
        }
        return loss if weights is None else torch.dot(losses, share * torch.cat(weights).to(share.dtype))

    def _known_constants(self, source_count: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the step before, where it had as many images: making them costs as much as the loss."""
        if torch.compiler.is_compiling():
            return self._constants(source_count, logits)
        key = source_count, len(logits), logits.dtype, logits.device
        if self._known is None or self._known[0] != key:
            with torch.inference_mode(False):  # else training could not use what an evaluation has made
                self._known = key, self._constants(source_count, logits)
        return self._known[1]

    def _constants(self, source_count: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of each image its share of the loss, and the sign of a logit that is wrong."""
        counts = source_count, len(logits) - source_count
        signs = (1.0, -1.0) if self.source_label == 0 else (-1.0, 1.0)
        share = torch.cat([logits.new_full((count,), self.domain_factor / count) for count in counts])
        return share, torch.cat([logits.new_full((count,), sign) for count, sign in zip(counts, signs, strict=True)])

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """A discriminator that is right on all images, while the features should have been turned against it."""
        accuracy = means.get("train/domain_accuracy", 0.5)
        if progress > 0.2 and accuracy > 0.99 and means.get("train/reversal_coefficient", 1.0) > 0.1:
            yield (
                "saturated",
                f"the discriminator tells the domains apart on {accuracy:.1%} of the images "
                "(`train/domain_accuracy`), so that the features learn little from it. Raise `--model.trade_off` or "
                "`--model.reversal_maximum`, or weaken it by `--model.discriminator_normalization dropout` or smaller "
                "`--model.discriminator_features`.",
            )


def at_least_one(flag: str, value: int) -> None:
    """Refuse a width below 1."""
    if value < 1:
        raise ConfigurationError(f"Expected `{flag}` to be at least 1, but got {value!r}.")


def one_of(flag: str, value: object, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in allowed:
        raise ConfigurationError(f"Expected `{flag}` to be one of {', '.join(map(str, allowed))}, but got {value!r}.")


class DomainAdversarialLoss(AdversarialLoss):
    """Loss of a domain discriminator behind a gradient reversal (Ganin 2016, eq. 9 and 18).

    The discriminator learns to tell source from target; the reversed gradient teaches the features the opposite.
    Diagnostics: ``domain_loss``, ``domain_accuracy`` and ``reversal_coefficient``, see :class:`AdversarialLoss`.

    Args:
        num_features: width ``D`` of the features.
        hidden_features: width of the discriminator's two hidden layers.
        normalization: in the discriminator: ``batch``, ``dropout`` or ``none``.
        domain_weighting: ``sum`` adds the mean losses of the two domains (the paper), ``mean`` halves that (CDAN's
            code and its successors).
        source_label: 1 (CDAN's code and its successors) or 0 (the paper and its code); learns the same.
        reversal_schedule: ``sigmoid`` (eq. 14), ``linear`` or ``constant``.
        reversal_gamma: steepness of the sigmoid ``2 / (1 + exp(-gamma * progress)) - 1``.
        reversal_maximum: what the coefficient is multiplied by.
    """

    term = "dann"

    def __init__(
        self,
        num_features: int,
        *,
        hidden_features: int = 1024,
        normalization: Normalization = "batch",
        domain_weighting: DomainWeighting = "sum",
        source_label: SourceLabel = 1,
        reversal_schedule: ReversalSchedule = "sigmoid",
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 1.0,
    ) -> None:
        super().__init__(
            num_features,
            hidden_features=hidden_features,
            normalization=normalization,
            domain_weighting=domain_weighting,
            source_label=source_label,
            reversal_schedule=reversal_schedule,
            reversal_gamma=reversal_gamma,
            reversal_maximum=reversal_maximum,
        )

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The discriminator's loss, a scalar; its gradient reaches the features reversed."""
        features = self.reverse(source, target, progress)
        return self.domain_loss(self.discriminator(features), len(source.features))


class DANN(DomainAdaptation):
    """Domain-adversarial neural network (Ganin et al., JMLR 2016).

    Args:
        num_classes: number of classes ``K``.
        discriminator_features: width of the discriminator's two hidden layers.
        discriminator_normalization: ``batch``, ``dropout`` or ``none``.
        domain_weighting: ``sum`` of the two domains' mean losses (the paper) or their ``mean``.
        source_label: the discriminator's name for the source, 1 or 0 (the paper); learns the same.
        reversal_schedule: of the reversal coefficient: ``sigmoid`` (the paper), ``linear`` or ``constant``.
        reversal_gamma: steepness of the sigmoid.
        reversal_maximum: the coefficient's final value.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        discriminator_features: int = 1024,
        discriminator_normalization: Normalization = "batch",
        domain_weighting: DomainWeighting = "sum",
        source_label: SourceLabel = 1,
        reversal_schedule: ReversalSchedule = "sigmoid",
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.alignment = DomainAdversarialLoss(
            self.num_features,
            hidden_features=discriminator_features,
            normalization=discriminator_normalization,
            domain_weighting=domain_weighting,
            source_label=source_label,
            reversal_schedule=reversal_schedule,
            reversal_gamma=reversal_gamma,
            reversal_maximum=reversal_maximum,
        )
