"""What the regularised fine-tuning methods share: cross-entropy plus a weighted term."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from framework.batch import LabelledBatch
from framework.errors import at_least_zero
from framework.functional import half_squared_distance
from framework.modules.transfer.base import TransferClassifier
from framework.networks import NetworkOutputs


class RegularizedTransfer(TransferClassifier):
    """Base of the methods that minimise ``cross-entropy + trade_off * R``: a method defines ``regularization``.

    It does not train by itself.

    Logs ``train/classification_loss``, ``train/regularization`` (before the weight) and the method's diagnostics; with
    a ``head_decay`` also ``train/head_regularization``, ``1/2 |v|^2``.

    Args:
        num_classes: number of classes ``K``.
        trade_off: weight of the term.
        head_decay: weight of ``1/2 |v|^2`` for the weights ``v`` of the new layers, bottleneck and head, which have no
            past to stay near; where the term takes the place of the optimizer's weight decay.
        options: those of :class:`~framework.modules.transfer.TransferClassifier`.
    """

    def __init__(self, num_classes: int, *, trade_off: float = 1.0, head_decay: float = 0.0, **options: Any) -> None:
        super().__init__(num_classes, **options)
        at_least_zero("--model.trade_off", trade_off)
        at_least_zero("--model.head_decay", head_decay)
        self.trade_off, self.head_decay = trade_off, head_decay
        self.diagnostics: dict[str, Tensor] = {}

    def regularization(self, outputs: NetworkOutputs, batch: LabelledBatch) -> Tensor:
        """The term of a batch, a scalar.

        Args:
            outputs: features ``[N, D]``, logits ``[N, K]`` and labels ``[N]`` of the batch.
            batch: images ``[N, 3, H, W]``, normalised, and labels ``[N]``.
        """
        raise TypeError(f"{type(self).__name__} has no regularization")

    def new_weights(self) -> list[nn.Parameter]:
        """What ``head_decay`` pulls to zero."""
        return [*self.bottleneck.parameters(), *self.head.parameters()]

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor | None:
        """Cross-entropy plus the weighted terms."""
        outputs = self.outputs(batch.images)._replace(labels=batch.labels)
        classification_loss = self.classification_loss(outputs.logits, batch.labels)
        regularization = self.regularization(outputs, batch)
        loss = classification_loss + self.trade_off * regularization
        terms = {"classification_loss": classification_loss, "regularization": regularization, **self.diagnostics}
        if self.head_decay:
            terms["head_regularization"] = half_squared_distance(self.new_weights())
            loss = loss + self.head_decay * terms["head_regularization"]
        return self.logged_loss(loss, **terms)
