"""Bi-Tuning: beside the cross-entropy, two contrasts with keys of past batches, one for each head.

Zhong et al., "Bi-tuning of Pre-trained Representations", 2020, arXiv:2011.06182.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.functional import queue_contrast, unit_length
from framework.modules.transfer.regularized import RegularizedTransfer
from framework.networks import KeyQueue, MomentumCopy, NetworkOutputs


class BiTuning(RegularizedTransfer):
    """Cross-entropy, contrastive cross-entropy of the head and categorical contrast of a projection (Zhong 2020).

    Both terms are :func:`~framework.functional.queue_contrast` with the newest keys of each class, made by a copy of
    the network whose weights follow slowly. In the *contrastive cross-entropy* the query is the head's weight vector
    of an image's class (with the bias, and a 1 behind the features), its partner the image's features. In the
    *categorical contrast* the query is the projection of an image's features, its partner that of its key.

    The key of an image is another view of it with ``--data.views 2``, as in the paper. With one view, the key is of the
    same pixels: it differs by the slower weights and dropout alone, and a step loads half of the images.

    Departures from TLlib, which holds the published constants: its queues begin with random vectors that count as keys
    of every class until they are replaced, here a place takes no part until it is filled; its contrastive
    cross-entropy sees the queue with the keys of the batch in it, here both terms see the queue before the batch.

    Queues and copies are in the state dict; with several processes all keys go to the queues of each.

    Logs ``train/class_contrast`` and ``train/instance_contrast``, the two terms.

    Args:
        num_classes: number of classes ``K``.
        trade_off: weight of the sum of both terms: 1 in TLlib.
        queue_length: keys a class: 40 in TLlib.
        momentum: of the copy's weights: 0.999 in TLlib.
        temperature: of both terms: 0.07 in TLlib.
        projection_features: width of the projection: 128 in TLlib.
        prototype_gradient: let the contrastive cross-entropy move the head's weights too; not in TLlib.
        options: those of :class:`~framework.modules.transfer.RegularizedTransfer`.
    """

    views: ClassVar[tuple[int, ...]] = (1, 2)

    def __init__(
        self,
        num_classes: int,
        *,
        trade_off: float = 1.0,
        queue_length: int = 40,
        momentum: float = 0.999,
        temperature: float = 0.07,
        projection_features: int = 128,
        prototype_gradient: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, trade_off=trade_off, **options)
        for flag, value in (("queue_length", queue_length), ("projection_features", projection_features)):
            if value < 1:
                raise ConfigurationError(f"Expected `--model.{flag}` to be at least 1, but got {value}.")
        if not 0 <= momentum <= 1:
            raise ConfigurationError(f"Expected `--model.momentum` to be in [0, 1], but got {momentum}.")
        if temperature <= 0:
            raise ConfigurationError(f"Expected `--model.temperature` to be above 0, but got {temperature}.")
        self.temperature, self.prototype_gradient = temperature, prototype_gradient
        self.projector = nn.Linear(self.num_features, projection_features)
        self.key_encoder = MomentumCopy(self.backbone, self.bottleneck, momentum=momentum)
        self.key_projector = MomentumCopy(self.projector, momentum=momentum)
        self.feature_queue = KeyQueue(num_classes, queue_length, self.num_features + 1)
        self.projection_queue = KeyQueue(num_classes, queue_length, projection_features)

    def configure_model(self) -> None:
        """Compile the copy's backbone too."""
        super().configure_model()
        if self.compile_networks and not getattr(self.key_encoder.copies[0], "_compiled_call_impl", None):
            self.key_encoder.copies[0].compile()

    def learning_rate_factor(self, part: str) -> float:
        """The projector learns at the backbone's rate (TLlib)."""
        return super().learning_rate_factor("backbone" if part == "projector" else part)

    # ------------------------------------------------------------------ training
    def outputs(self, images: Tensor) -> NetworkOutputs:
        """Features ``[N, D]`` and logits ``[N, K]`` of images ``[N, 3, H, W]``, or of the first of their views."""
        return super().outputs(images[:, 0] if images.dim() == 5 else images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the copies follow, once for each step of the optimizer."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.key_encoder.follow(self.backbone, self.bottleneck)
            self.key_projector.follow(self.projector)

    def regularization(self, outputs: NetworkOutputs, batch: LabelledBatch) -> Tensor:
        """The sum of both contrasts of a batch, a scalar; then its keys go to the queues."""
        labels = batch.labels
        key_features = self.key_encoder(batch.images[:, 1] if batch.images.dim() == 5 else batch.images)
        key_projections = self.key_projector(key_features)

        prototypes = torch.cat([self.head.weight, self.head.bias[:, None]], dim=1)
        if not self.prototype_gradient:
            prototypes = prototypes.detach()
        class_contrast = self._contrast(prototypes[labels], with_one(outputs.features), self.feature_queue, labels)
        projections = self.projector(outputs.features)
        instance_contrast = self._contrast(projections, key_projections, self.projection_queue, labels)

        every_label = self.of_all_processes(labels)
        self.feature_queue.add(self.of_all_processes(unit_length(with_one(key_features))), every_label)
        self.projection_queue.add(self.of_all_processes(unit_length(key_projections)), every_label)
        self.diagnostics = {
            "class_contrast": class_contrast.detach(),
            "instance_contrast": instance_contrast.detach(),
        }
        return class_contrast + instance_contrast

    def _contrast(self, queries: Tensor, partners: Tensor, queue: KeyQueue, labels: Tensor) -> Tensor:
        # a copy of the keys: the backward pass needs them after others have taken their places
        return queue_contrast(queries, partners, queue.keys.clone(), queue.filled, labels, self.temperature)


def with_one(features: Tensor) -> Tensor:
    """Features ``[N, D]`` with a 1 behind them, ``[N, D + 1]``: what a bias is the weight of."""
    return F.pad(features, (0, 1), value=1.0)
