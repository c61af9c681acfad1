"""A pretrained backbone on a new task."""

from __future__ import annotations

from typing import Any, Literal

from framework.errors import ConfigurationError
from framework.modules.base import ImageClassifier


class TransferClassifier(ImageClassifier):
    """A pretrained backbone with a new head, fine-tuned whole or kept frozen.

    Args:
        num_classes: number of classes ``K``.
        policy: ``full`` trains all parts, the backbone at ``backbone_learning_rate_factor``; ``frozen`` trains the head
            on fixed features: neither the backbone's weights nor its batch-norm statistics change.
        options: those of :class:`~framework.modules.base.ImageClassifier`.
    """

    def __init__(self, num_classes: int, *, policy: Literal["full", "frozen"] = "full", **options: Any) -> None:
        super().__init__(num_classes, **options)
        if policy not in ("full", "frozen"):
            raise ConfigurationError(f"Expected `--model.policy` to be 'full' or 'frozen', but got {policy!r}.")
        self.policy = policy
        if policy == "frozen":
            self.backbone.requires_grad_(False)
            self.backbone.eval()

    def train(self, mode: bool = True) -> TransferClassifier:
        """Training mode, but for a frozen backbone: in training mode its batch statistics would change the features."""
        super().train(mode)
        if getattr(self, "policy", None) == "frozen":
            self.backbone.eval()
        return self
