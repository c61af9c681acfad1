"""Training on the source alone: the baseline that every method is measured against."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from framework.batch import DomainBatch
from framework.modules.adaptation.base import DomainAdaptation


class SourceOnly(DomainAdaptation):
    """Cross-entropy on the source. The target is loaded, as every method does, and never looked at.

    Not even batch normalisation sees a target image in training: it would adapt for free.

    Args:
        num_classes: number of classes ``K``.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`; alignment has no effect.
    """

    # it sees no target images that the target's batch normalisation could learn from
    refused_batch_norm = ("domain_specific",)

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)

    def training_step(self, batch: DomainBatch, batch_idx: int) -> Tensor | None:
        """Classification on the source."""
        loss = self.classification_loss(self(batch.source.images), batch.source.labels)
        return self.logged_loss(loss, classification_loss=loss)
