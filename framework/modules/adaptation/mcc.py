"""Minimum class confusion: predictions of target images that do not mix up classes.

Jin et al., "Minimum Class Confusion for Versatile Domain Adaptation", ECCV 2020, arXiv:1912.03699.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import class_confusion, prediction_entropy
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs


class MinimumClassConfusionLoss(AlignmentLoss):
    """Mean confusion between different classes in the target's predictions (Jin 2020, section 3).

    It asks nothing of the source: the domains are not aligned, target predictions are made unambiguous class by class.
    Diagnostics: ``class_confusion``, the loss itself (``1 - 1 / K`` where all predictions are uniform, 0 where none is
    ambiguous), and ``target_entropy``, the mean entropy of the predictions in nats, without the temperature.

    Args:
        temperature: of the softmax, against overconfidence: 2.5 in the paper.
    """

    term = "mcc"
    is_task = True

    def __init__(self, temperature: float = 2.5) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigurationError(f"Expected `--model.temperature` to be above 0, but got {temperature}.")
        self.temperature = temperature

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The mean off-diagonal row sum, a scalar; ``source`` and ``progress`` play no part."""
        confusion = class_confusion(target.logits, self.temperature)
        loss = (confusion.sum() - confusion.diagonal().sum()) / len(confusion)
        self.diagnostics = {
            "class_confusion": loss.detach(),
            "target_entropy": prediction_entropy(target.logits.detach()).mean(),
        }
        return loss


class MCC(DomainAdaptation):
    """Minimum class confusion (Jin et al., ECCV 2020).

    Args:
        num_classes: number of classes ``K``.
        temperature: of the softmax whose confusion is minimised.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(self, num_classes: int, *, temperature: float = 2.5, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.alignment = MinimumClassConfusionLoss(temperature)
