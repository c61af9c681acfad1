"""DELTA: feature maps that stay near the source network's, most of all in the channels that matter to the new task.

Li et al., "DELTA: Deep Learning Transfer using Feature Map with Attention for Convolutional Networks", ICLR 2019,
arXiv:1901.09229.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.functional import channel_distances
from framework.modules.transfer.regularized import RegularizedTransfer
from framework.modules.transfer.training_images import gathered_rows
from framework.networks import FrozenCopy, NetworkOutputs
from framework.networks.channel_attention import (
    ChannelAttention,
    attention_weights,
    loss_increases,
    train_linear_classifier,
)
from framework.networks.feature_maps import FeatureMaps, channel_dimension, layer_names
from framework.reports import report

Attention = Literal["supervised", "first_order", "none"]
BatchReduction = Literal["mean", "sum"]


class DELTA(RegularizedTransfer):
    """DELTA (Li et al., ICLR 2019): ``cross-entropy + alpha * R + beta / 2 |v|^2``.

    ``R = 1/2 sum over layers of C sum over channels c of a_c d_c``, where ``d_c`` is the squared difference of channel
    ``c`` between the fine-tuned backbone and the source network (the backbone before training, in evaluation mode), the
    mean over positions and images, and the attention ``a`` sums to 1 over the layer's ``C`` channels. ``v`` are the
    weights of bottleneck and head, ``alpha`` is ``trade_off`` and ``beta`` is ``head_decay``. The term takes the place
    of the optimizer's weight decay, whose default is 0 here.

    The attention is computed once, when the training starts. A linear classifier is trained on the source network's
    features of one epoch of the training data; the increase of its loss where channel ``c`` is switched off, over a few
    batches, standardised over the layer and divided by a temperature, goes through a softmax. That takes a forward pass
    for each channel and batch: thousands for a large network. ``first_order`` estimates the increases by ``-gradient *
    map``, from one pass a batch. The source network and the attention are in the checkpoint.

    Diagnostics: ``feature_distance``, the mean of all ``d_c`` over channels and layers, and ``head_regularization``,
    ``1/2 |v|^2``.

    Args:
        num_classes: number of classes ``K``.
        trade_off: ``alpha``. The authors' code has 0.01 on the sum over a batch of 64, which is 0.64 on its mean.
        head_decay: ``beta``.
        layers: of so many last stages of the backbone (the four residual stages of a ResNet), or names of its modules.
            The authors' code and TLlib take the stages' last convolutions, before batch norm and shortcut,
            ``[layer1.2.conv3, layer2.3.conv3, layer3.5.conv3, layer4.2.conv3]`` of a ResNet-50.
        attention: ``supervised`` (the paper), ``first_order``, or ``none`` for equal weights. TLlib's ``feature_map``
            is that without the mean over positions.
        attention_batches: how many batches of each process the increases are averaged over; 4 in the authors' code.
        attention_temperature: 5 in the authors' code; None for the softmax of the increases themselves, the paper's
            formula, which is nearly uniform.
        batch_reduction: ``mean`` over the images of a batch, or their ``sum`` as in the authors' code and TLlib.
        weight_decay: of the optimizer, on top of the two terms.
        options: those of :class:`~framework.modules.transfer.TransferClassifier`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        trade_off: float = 0.64,
        head_decay: float = 0.01,
        layers: int | list[str] = 4,
        attention: Attention = "supervised",
        attention_batches: int = 4,
        attention_temperature: float | None = 5.0,
        batch_reduction: BatchReduction = "mean",
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        decays = {"head_decay": head_decay, "weight_decay": weight_decay}
        super().__init__(num_classes, trade_off=trade_off, **decays, **options)
        _one_of("--model.attention", attention, ("supervised", "first_order", "none"))
        _one_of("--model.batch_reduction", batch_reduction, ("mean", "sum"))
        if attention_batches < 1:
            raise ConfigurationError(
                f"Expected `--model.attention_batches` to be at least 1, but got {attention_batches}."
            )
        if attention_temperature is not None and attention_temperature <= 0:
            raise ConfigurationError(
                f"Expected `--model.attention_temperature` to be above 0, but got {attention_temperature}."
            )
        self.batch_reduction = batch_reduction
        self.attention_kind, self.attention_batches = attention, attention_batches
        self.attention_temperature = attention_temperature
        names = layer_names(self.backbone, layers)
        self.source = FrozenCopy(self.backbone)  # before the hooks: each network has its own
        self.maps, self.source_maps = FeatureMaps(self.backbone, names), FeatureMaps(self.source.module, names)
        self.attention = ChannelAttention(names) if attention != "none" else None

    def configure_model(self) -> None:
        """Compile the source network too."""
        super().configure_model()
        if self.compile_networks and not getattr(self.source.module, "_compiled_call_impl", None):
            self.source.module.compile()

    # ------------------------------------------------------------------ attention
    def on_fit_start(self) -> None:
        """Compute the attention, unless a checkpoint has brought it."""
        super().on_fit_start()
        if self.attention is None or self.attention.known:
            return
        report(f"Computing DELTA's attention (`--model.attention {self.attention_kind}`) …")
        with isolate_rng():  # of loaders that are not the framework's
            increases = self._loss_increases()
        for layer, values in increases.items():
            values = self.trainer.strategy.reduce(values, reduce_op="mean")  # every process has the same weights
            self.attention[layer] = attention_weights(values, self.attention_temperature)

    def _loss_increases(self) -> dict[str, Tensor]:
        features: list[Tensor] = []
        labels: list[Tensor] = []
        first: list[tuple[Tensor, Tensor]] = []
        for batch in self._training_batches():
            features.append(self.source(batch.images))
            labels.append(batch.labels)
            if len(first) < self.attention_batches:
                first.append((batch.images, batch.labels))
        # every process's features, so that all train the same classifier
        every_feature, every_label = (gathered_rows(self, torch.cat(rows)) for rows in (features, labels))
        classifier = train_linear_classifier(every_feature, every_label, self.num_classes)
        first_order = self.attention_kind == "first_order"
        return loss_increases(self.source.module, self.source_maps, classifier, first, first_order)

    def _training_batches(self) -> Iterator[LabelledBatch]:
        """One epoch of the training data, from a loader of its own: the run's position does not move."""
        loader = self.trainer.fit_loop._data_source.dataloader()
        limit = self.trainer.limit_train_batches
        count = limit if isinstance(limit, int) else int(limit * len(loader))
        for batch in itertools.islice(loader, max(count, 1)):
            yield self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    # ------------------------------------------------------------------ training
    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor | None:
        """Cross-entropy plus the weighted term, while the feature maps are caught."""
        with self.maps.recording(), self.source_maps.recording():
            return super().training_step(batch, batch_idx)

    def regularization(self, outputs: NetworkOutputs, batch: LabelledBatch) -> Tensor:
        """The attended distance between the two networks' feature maps, a scalar."""
        self.source(batch.images)
        terms, means = [], []
        for layer in self.maps.layers:
            channels = channel_dimension(self.backbone.get_submodule(layer), self.maps[layer])
            distances = channel_distances(self.maps[layer], self.source_maps[layer], channels)
            attended = distances.mean() if self.attention is None else (self.attention[layer] * distances).sum()
            terms.append(len(distances) * attended / 2)
            means.append(distances.detach().mean())
        self.diagnostics = {"feature_distance": torch.stack(means).mean()}
        return torch.stack(terms).sum() * (len(batch.images) if self.batch_reduction == "sum" else 1)


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigurationError(f"Expected `{flag}` to be one of {', '.join(known)}, but got {value!r}.")
