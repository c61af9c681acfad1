"""Residual classifiers trained from scratch (He et al., CVPR 2016 and ECCV 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from framework.batch import LabelledBatch
from framework.errors import at_least_zero
from framework.modules.base import ImageClassifier


class ResidualClassifier(ImageClassifier):
    """A network trained from scratch on labelled images, all parts at one learning rate.

    Args:
        num_classes: number of classes ``K``.
        backbone: ``resnet8`` to ``resnet110`` for 32 px, ``resnet18`` to ``resnet152`` for 224 px, or any other.
        mixup: parameter of mixup's Beta distribution (Zhang 2018); 0 for none.
        cutmix: parameter of CutMix's Beta distribution (Yun 2019); 0 for none. With both, each batch takes one of
            them at random.
        learning_rate, weight_decay: He 2015's by default.
        options: those of :class:`~framework.modules.base.ImageClassifier`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet20",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        learning_rate: float = 0.1,
        weight_decay: float = 1e-4,
        backbone_learning_rate_factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            backbone=backbone,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            backbone_learning_rate_factor=backbone_learning_rate_factor,
            **options,
        )
        at_least_zero("--model.mixup", mixup)
        at_least_zero("--model.cutmix", cutmix)
        self.mixes: list[v2.Transform] = []
        if mixup:
            self.mixes.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            self.mixes.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor | None:
        """Cross-entropy of the batch, mixed or not."""
        if not self.mixes:
            return super().training_step(batch, batch_idx)
        mix = self.mixes[int(torch.randint(len(self.mixes), ()))]
        images, labels = mix(batch.images, batch.labels)
        return self.logged_loss(self.classification_loss(self(images), labels))
