"""Batch spectral penalisation: an adversarial method that may not put all transfer into one direction.

Chen et al., "Transferability vs. Discriminability: Batch Spectral Penalization for Adversarial Domain Adaptation",
ICML 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from framework.errors import ConfigurationError, at_least_zero
from framework.functional import full_precision, largest_squared_singular_values
from framework.modules.adaptation.base import AlignmentLoss
from framework.modules.adaptation.dann import DANN
from framework.networks import NetworkOutputs


class BatchSpectralPenalizationLoss(AlignmentLoss):
    """The squares of the largest singular values of both domains' features ``[N, D]``, summed (Chen 2019).

    Diagnostics: ``source_spectral_share`` and ``target_spectral_share``, what part of all squared singular values
    (which is of the squared norms) the penalised ones are: 1 where all features lie in one direction, not below
    ``largest / min(N, D)``.

    Args:
        largest: how many singular values of each domain: 1 in the paper.
    """

    term = "bsp"

    def __init__(self, largest: int = 1) -> None:
        super().__init__()
        if largest < 1:
            raise ConfigurationError(f"Expected `--model.largest` to be at least 1, but got {largest}.")
        self.largest = largest

    @full_precision
    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The penalty, a scalar; ``progress`` plays no part."""
        source_value = largest_squared_singular_values(source.features, self.largest)
        target_value = largest_squared_singular_values(target.features, self.largest)
        self.diagnostics = {
            "source_spectral_share": _share(source_value, source.features),
            "target_spectral_share": _share(target_value, target.features),
        }
        return source_value + target_value


def _share(value: Tensor, features: Tensor) -> Tensor:
    return value.detach() / features.detach().square().sum().clamp(min=1e-30)


class PenalizedAlignmentLoss(AlignmentLoss):
    """An alignment loss plus a weighted spectral penalty; diagnostics and complaints of both."""

    def __init__(self, alignment: AlignmentLoss, penalty: BatchSpectralPenalizationLoss, penalty_weight: float) -> None:
        super().__init__()
        at_least_zero("--model.penalty_weight", penalty_weight)
        self.alignment, self.penalty, self.penalty_weight = alignment, penalty, penalty_weight

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The sum, a scalar."""
        loss: Tensor = self.alignment(source, target, progress)
        penalty: Tensor = self.penalty(source, target, progress)
        self.diagnostics = {
            **self.alignment.diagnostics,
            **self.penalty.diagnostics,
            "spectral_penalty": self.penalty_weight * penalty.detach(),
        }
        return loss + self.penalty_weight * penalty

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """Those of the alignment loss, and of the penalty."""
        yield from self.alignment.complaints(means, progress)
        yield from self.penalty.complaints(means, progress)


class BSP(DANN):
    """DANN with batch spectral penalisation (Chen et al., ICML 2019).

    Args:
        num_classes: number of classes ``K``.
        penalty_weight: of the spectral penalty beside the discriminator's loss; ``trade_off`` multiplies both.
        largest: how many singular values of each domain's features are penalised.
        discriminator_features: width of the discriminator's hidden layers.
        options: those of :class:`~framework.modules.adaptation.DANN`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        penalty_weight: float = 0.0002,
        largest: int = 1,
        discriminator_features: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, discriminator_features=discriminator_features, **options)
        self.alignment = PenalizedAlignmentLoss(self.alignment, BatchSpectralPenalizationLoss(largest), penalty_weight)
