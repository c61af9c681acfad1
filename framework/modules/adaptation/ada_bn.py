"""Adaptive batch normalisation: a classifier of the source with the batch-norm statistics of the target.

Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", 2016, arXiv:1603.04779; Pattern Recognition
80, 2018.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from framework.batch import DomainBatch
from framework.modules.adaptation.base import DomainAdaptation
from framework.networks import DomainSpecificBatchNorm, convert_domain_specific


class AdaBN(DomainAdaptation):
    """Cross-entropy on the source; target images are seen by the statistics of batch normalisation alone.

    The weights are those that :class:`~framework.modules.adaptation.SourceOnly` would learn, bit for bit. Each batch
    norm has two sets of statistics: the source's normalise source images, the target's those of the target, in test
    and prediction too. The paper takes the target's after training, from all its images; here they are running averages
    with the norm's own momentum (0.1: about the last 20 batches), which follow the weights, need no pass of their own,
    and are part of every checkpoint.

    Logs ``val/batch_norm_shift``: how far the two sets of running means are apart, in standard deviations of the
    source, on average over all channels. Near 0 there is nothing for this method to gain.

    Args:
        num_classes: number of classes ``K``.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`; alignment has no effect, and
            ``batch_norm`` is this method's own, whatever ``joint`` means elsewhere.
    """

    refused_batch_norm = ("separate", "domain_specific")

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.adaptive_layers = {}
        for name in ("backbone", "bottleneck"):
            part = convert_domain_specific(getattr(self, name), share_weights=True)
            setattr(self, name, part)
            self.adaptive_layers[name] = sum(isinstance(module, DomainSpecificBatchNorm) for module in part.modules())
        self.batch_norm = "domain_specific"  # the base then selects each domain's statistics, see outputs_in

    def prepare_data(self) -> None:
        """Say where the network leaves this method nothing to adapt."""
        super().prepare_data()
        if self.trainer.state.fn == "fit" and not self.adaptive_layers["backbone"]:
            rank_zero_warn(
                "Expected `--model.backbone` to have batch normalisation, whose statistics AdaBN adapts, but "
                f"{self.hparams['backbone']} has none: "
                + ("only the bottleneck adapts." if self.adaptive_layers["bottleneck"] else "this is SourceOnly.")
            )

    def training_step(self, batch: DomainBatch, batch_idx: int) -> Tensor | None:
        """Classification on the source; the target's forward only updates its statistics."""
        # the source first, so that its dropout draws what it does without a target
        source = self.outputs_in("source", batch.source.images)
        loss = self.classification_loss(source.logits, batch.source.labels)
        with torch.no_grad():
            target = self.outputs_in("target", batch.target)
        self.watch_target(target.logits)
        return self.logged_loss(loss, classification_loss=loss)

    def on_validation_epoch_end(self) -> None:
        """Label-free scores of the target, and how far the domains' statistics are apart."""
        super().on_validation_epoch_end()
        shifts = []
        for layer in self.modules():
            if isinstance(layer, DomainSpecificBatchNorm):
                source, target = layer.source, layer.target
                assert source.running_mean is not None
                assert source.running_var is not None
                assert target.running_mean is not None
                shifts.append((target.running_mean - source.running_mean).abs() / (source.running_var + 1e-5).sqrt())
        if shifts:
            self.log("val/batch_norm_shift", torch.cat(shifts).mean(), sync_dist=True)
