"""What the regularised fine-tuning methods share: cross-entropy plus a weighted term."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from framework.batch import LabelledBatch
from framework.errors import at_least_zero
from framework.modules.transfer.base import TransferClassifier
from framework.networks import NetworkOutputs


class RegularizedTransfer(TransferClassifier):
    """Base of the methods that minimise ``cross-entropy + trade_off * R``: a method defines ``regularization``.

    It does not train by itself.

    Logs ``train/classification_loss``, ``train/regularization`` (before the weight) and the method's diagnostics.

    Args:
        num_classes: number of classes ``K``.
        trade_off: weight of the term.
        options: those of :class:`~framework.modules.transfer.TransferClassifier`.
    """

    def __init__(self, num_classes: int, *, trade_off: float = 1.0, **options: Any) -> None:
        super().__init__(num_classes, **options)
        at_least_zero("--model.trade_off", trade_off)
        self.trade_off = trade_off
        self.diagnostics: dict[str, Tensor] = {}

    def regularization(self, outputs: NetworkOutputs, batch: LabelledBatch) -> Tensor:
        """The term of a batch, a scalar.

        Args:
            outputs: features ``[N, D]``, logits ``[N, K]`` and labels ``[N]`` of the batch.
            batch: images ``[N, 3, H, W]``, normalised, and labels ``[N]``.
        """
        raise TypeError(f"{type(self).__name__} has no regularization")

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor | None:
        """Cross-entropy plus the weighted term."""
        outputs = self.outputs(batch.images)._replace(labels=batch.labels)
        classification_loss = self.classification_loss(outputs.logits, batch.labels)
        regularization = self.regularization(outputs, batch)
        return self.logged_loss(
            classification_loss + self.trade_off * regularization,
            classification_loss=classification_loss,
            regularization=regularization,
            **self.diagnostics,
        )
