"""Co-Tuning: the source classifier is fine-tuned too, on the source classes that each new class resembles.

You et al., "Co-Tuning for Transfer Learning", NeurIPS 2020.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.functional import (
    direct_relationship,
    reverse_relationship,
    soft_cross_entropy,
    source_probabilities,
)
from framework.modules.transfer.source_task import SourceTaskTransfer
from framework.modules.transfer.training_images import evaluated_training_images, gathered_rows
from framework.networks import NetworkOutputs

Relationship = Literal["reverse", "direct"]


class CoTuning(SourceTaskTransfer):
    """Cross-entropy plus that of the source head on ``p(source class | class)`` of each image's class (You 2020).

    The relationship ``p(source class | class)`` is learned once, at the start of a run, from the pretrained network's
    source predictions on all training images, without augmentation. It is in the state dict (``relationship``, ``[K,
    S]``), so that a resumed run has it and needs no pass. With several processes each predicts its share; the learned
    relationship is the first one's.

    Two things can be calibrated. ``calibrate`` scales the logits of the regression from source classes to classes, on
    the training images that it was not fitted on (one in five; the paper's code has a validation folder for that).
    ``source_temperature`` is that of the source classifier itself, which takes labelled images of the source task to
    find; these are not here, so it is an argument: 1 / 0.884 in the paper's code, for torchvision's ResNet-50 with
    IMAGENET1K_V1. TLlib has neither.

    Args:
        num_classes: number of classes ``K``.
        trade_off: weight of the source head's loss: 2.3 in the paper's code and TLlib.
        relationship: ``reverse`` learns ``p(class | source class)`` and turns it round by Bayes' rule (the paper's
            code); ``direct`` is the mean source prediction of each class (TLlib).
        calibrate: calibrate the regression of ``reverse``; ``direct`` has none.
        source_temperature: of the source classifier's predictions when the relationship is learned.
        options: those of :class:`~framework.modules.transfer.source_task.SourceTaskTransfer`.
    """

    relationship: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        trade_off: float = 2.3,
        relationship: Relationship = "reverse",
        calibrate: bool = True,
        source_temperature: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, trade_off=trade_off, **options)
        if relationship not in ("reverse", "direct"):
            raise ConfigurationError(
                f"Expected `--model.relationship` to be 'reverse' or 'direct', but got {relationship!r}."
            )
        if source_temperature <= 0:
            raise ConfigurationError(
                f"Expected `--model.source_temperature` to be above 0, but got {source_temperature}."
            )
        self.approach, self.calibrate, self.source_temperature = relationship, calibrate, source_temperature
        self.register_buffer("relationship", torch.zeros(num_classes, self.source_classes))  # zeros: not learned yet

    # ------------------------------------------------------------------ before training
    def on_fit_start(self) -> None:
        """Learn the relationship, unless a checkpoint has it."""
        super().on_fit_start()
        if not self.relationship.any():
            self.relationship.copy_(self.learned_relationship())

    def learned_relationship(self) -> Tensor:
        """``p(source class | class)`` by the network as it is, float64 ``[K, S]``, the same on all processes."""
        rank_zero_info("CoTuning: learning how the source classes relate to the new ones …")
        predicted, labels = [], []
        with evaluated_training_images(self) as batches:
            for batch in batches:
                logits = self.source_head(self.backbone(batch.images))
                predicted.append(source_probabilities(logits, self.source_temperature))
                labels.append(batch.labels)
        every_prediction = gathered_rows(self, torch.cat(predicted))
        every_label = gathered_rows(self, torch.cat(labels))
        if self.device.type not in ("cpu", "cuda"):  # where float64 may be missing
            every_prediction, every_label = every_prediction.cpu(), every_label.cpu()
        if self.approach == "direct":
            learned = direct_relationship(every_prediction, every_label, self.num_classes)
        else:
            learned = reverse_relationship(every_prediction, every_label, self.num_classes, calibrate=self.calibrate)
        # a sum may end in another last digit on another device
        first: Tensor = self.trainer.strategy.broadcast(learned.cpu())
        return first

    # ------------------------------------------------------------------ training
    def regularization(self, outputs: NetworkOutputs, batch: LabelledBatch) -> Tensor:
        """Cross-entropy of the source head with the rows of the batch's classes, a scalar."""
        return soft_cross_entropy(self.source_logits(), self.relationship[batch.labels])
