"""Adversarial discriminative adaptation: the source's encoder is trained first and kept; a copy becomes the target's.

Tzeng et al., "Adversarial Discriminative Domain Adaptation", CVPR 2017, arXiv:1702.05464.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from framework.batch import DomainBatch
from framework.errors import ConfigurationError
from framework.modules.adaptation.base import AlignmentLoss, Domain, DomainAdaptation
from framework.modules.adaptation.dann import (
    DomainWeighting,
    Normalization,
    SourceLabel,
    at_least_one,
    domain_cross_entropy,
    domain_errors,
    one_of,
)
from framework.networks import DomainDiscriminator, NetworkOutputs
from framework.progress import batches_planned, batches_processed


class AdversarialInvertedLabelLoss(AlignmentLoss):
    """Loss of a discriminator plus that of the target's features under the inverted label (Tzeng 2017, eq. 9).

    The discriminator learns to tell source from target features; the target's features learn to be called source,
    which has a strong gradient where a reversed one vanishes, at features that the discriminator is sure about. The
    sum is one loss: the discriminator sees detached features, and the features a detached discriminator. The source's
    features get no gradient.

    Diagnostics: ``domain_loss`` (nats per image; log 2 = 0.69 where the discriminator guesses), ``domain_accuracy``
    (0.5 where it guesses) and ``inverted_loss``, the target features' (0.69 where it guesses, more where it wins).

    Args:
        num_features: width ``D`` of the features.
        hidden_features: width of the discriminator's two hidden layers.
        normalization: in the discriminator: ``none`` (the paper), ``batch`` (TLlib) or ``dropout``.
        domain_weighting: ``sum`` adds the discriminator's mean losses on the two domains (the paper), ``mean`` halves
            that (TLlib).
        source_label: what the discriminator calls the source, 1 (the paper) or 0; learns the same.
    """

    term = "adda"

    def __init__(
        self,
        num_features: int,
        *,
        hidden_features: int = 1024,
        normalization: Normalization = "none",
        domain_weighting: DomainWeighting = "sum",
        source_label: SourceLabel = 1,
    ) -> None:
        super().__init__()
        at_least_one("--model.discriminator_features", hidden_features)
        one_of("--model.discriminator_normalization", normalization, get_args(Normalization))
        one_of("--model.domain_weighting", domain_weighting, get_args(DomainWeighting))
        one_of("--model.source_label", source_label, get_args(SourceLabel))
        self.discriminator = DomainDiscriminator(num_features, hidden_features, normalization)
        self.domain_factor = {"sum": 1.0, "mean": 0.5}[domain_weighting]
        self.source_label = source_label

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """Both losses' sum, a scalar; ``progress`` plays no part."""
        count, label = len(source.features), self.source_label
        features = torch.cat([source.features.detach(), target.features])
        logits = self.discriminator(features.detach())
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        target_logits = torch.func.functional_call(self.discriminator, frozen, (features,))[count:]
        source_loss = domain_cross_entropy(logits[:count], True, label).mean()
        target_loss = domain_cross_entropy(logits[count:], False, label).mean()
        inverted_loss = domain_cross_entropy(target_logits, True, label).mean()
        errors = domain_errors(logits[:count], True, label).mean() + domain_errors(logits[count:], False, label).mean()
        self.diagnostics = {
            "domain_loss": (source_loss + target_loss).detach() / 2,
            "domain_accuracy": 1 - errors / 2,
            "inverted_loss": inverted_loss.detach(),
        }
        return self.domain_factor * (source_loss + target_loss) + inverted_loss

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """A discriminator that is right on all images: the target's features do not come near the source's."""
        accuracy = means.get("train/domain_accuracy", 0.5)
        if progress > 0.2 and accuracy > 0.99:
            yield (
                "saturated",
                f"the discriminator tells the domains apart on {accuracy:.1%} of the images "
                "(`train/domain_accuracy`): the target's features do not come near the source's, or were thrown out "
                "of their reach. Lower `--model.adaptation_learning_rate_factor`, or weaken the discriminator by "
                "`--model.discriminator_normalization dropout` or smaller `--model.discriminator_features`.",
            )


class ADDA(DomainAdaptation):
    """Adversarial discriminative domain adaptation (Tzeng et al., CVPR 2017), both stages in one run.

    In the first stage, the first ``pretraining_share`` of the run, backbone, bottleneck and head learn to classify
    the source; no target image is seen. Then backbone and bottleneck are copied: the copies, ``source_backbone`` and
    ``source_bottleneck``, are the source's encoder and do not change any more, nor does the head; ``backbone`` and
    ``bottleneck`` go on as the target's encoder, trained with a discriminator by the target's images alone, and are
    what test and prediction use. The source's validation uses the source's encoder. The optimizer starts anew at the
    switch (no momentum of the first stage); the learning rate's schedule goes on, at a multiple of the first stage's.

    Batch normalisation sees one domain at a time under any policy: the source's images in the first stage, the target's
    in the second, while the source's encoder stays in evaluation mode. So ``joint``, the default, joins nothing, and
    the other two policies are refused.

    Args:
        num_classes: number of classes ``K``.
        pretraining_share: share of the run that is the first stage, between 0 and 1.
        adaptation_learning_rate_factor: multiple of the learning rates in the second stage. With nothing to hold the
            target's encoder, a rate that is good for classification from scratch throws its features out of reach; the
            published codes have the same, low rate in both stages, which is a factor of 1.
        discriminator_features: width of the discriminator's two hidden layers.
        discriminator_normalization: ``none`` (the paper), ``batch`` (TLlib) or ``dropout``.
        domain_weighting: ``sum`` of the discriminator's mean losses on the two domains (the paper) or their ``mean``.
        source_label: the discriminator's name for the source, 1 (the paper) or 0; learns the same.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`; ``trade_off`` weighs the second
            stage's loss, which has no other term.
    """

    refused_batch_norm = ("separate", "domain_specific")

    def __init__(
        self,
        num_classes: int,
        *,
        pretraining_share: float = 0.5,
        adaptation_learning_rate_factor: float = 0.1,
        discriminator_features: int = 1024,
        discriminator_normalization: Normalization = "none",
        domain_weighting: DomainWeighting = "sum",
        source_label: SourceLabel = 1,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        if not 0 < pretraining_share < 1:
            raise ConfigurationError(
                f"Expected `--model.pretraining_share` to be between 0 and 1, but got {pretraining_share}."
            )
        if not adaptation_learning_rate_factor > 0:
            raise ConfigurationError(
                "Expected `--model.adaptation_learning_rate_factor` to be above 0, but got "
                f"{adaptation_learning_rate_factor}."
            )
        self.pretraining_share, self.adaptation_factor = pretraining_share, adaptation_learning_rate_factor
        self.adapting = False  # which stage; in the state dict
        # from the start, so that the state dict has the same keys in both stages
        self.source_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.source_bottleneck = copy.deepcopy(self.bottleneck).requires_grad_(False)
        self.alignment = AdversarialInvertedLabelLoss(
            self.num_features,
            hidden_features=discriminator_features,
            normalization=discriminator_normalization,
            domain_weighting=domain_weighting,
            source_label=source_label,
        )

    def configure_model(self) -> None:
        """Compile the source's backbone too."""
        super().configure_model()
        if self.compile_networks and not getattr(self.source_backbone, "_compiled_call_impl", None):
            self.source_backbone.compile()

    # ------------------------------------------------------------------ the stage
    def get_extra_state(self) -> Tensor:
        """The stage, for the state dict: a host value that costs a step no transfer."""
        return torch.tensor(self.adapting)

    def set_extra_state(self, state: Tensor) -> None:
        """The stage of a state dict."""
        self.adapting = bool(state)
        self.train(self.training)

    def train(self, mode: bool = True) -> ADDA:
        """Training mode, but for the source's encoder once it is in use."""
        super().train(mode)
        for encoder in (self.source_backbone, self.source_bottleneck):
            encoder.train(mode and not self.adapting)
        return self

    def on_train_start(self) -> None:
        """A run from its beginning begins with the first stage, also of a module that was trained before."""
        if batches_processed(self.trainer) == 0:
            self.adapting = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Change the stage where it is time."""
        super().on_train_batch_start(batch, batch_idx)
        planned = batches_planned(self.trainer) or 1
        if not self.adapting and batches_processed(self.trainer) >= self.pretraining_share * planned:
            self.begin_adaptation()

    def begin_adaptation(self) -> None:
        """Keep the encoder as the source's, and forget what the optimizer knows of classification."""
        self.source_backbone.load_state_dict(self.backbone.state_dict())
        self.source_bottleneck.load_state_dict(self.bottleneck.state_dict())
        for parameter in self.parameters():
            parameter.grad = None  # what has accumulated; without a gradient, the optimizer leaves the head alone
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = self.adaptation_factor * group["lr"]
        for configuration in self.trainer.lr_scheduler_configs:  # in their state dict, as the rates in the optimizer's
            rates = configuration.scheduler.base_lrs
            configuration.scheduler.base_lrs = [self.adaptation_factor * rate for rate in rates]
        self.adapting = True
        self.train(self.training)

    # ------------------------------------------------------------------ network
    def outputs_in(self, domain: Domain, images: Tensor) -> NetworkOutputs:
        """Outputs by the domain's own encoder; in the first stage there is one."""
        if domain == "target" or not self.adapting:
            return self.outputs(images)
        features = self.source_bottleneck(self.source_backbone(images))
        return NetworkOutputs(features, self.head(features))

    # ------------------------------------------------------------------ training
    def training_step(self, batch: DomainBatch, batch_idx: int) -> Tensor | None:
        """Classification on the source; in the second stage the adversarial loss of the target's encoder."""
        if not self.adapting:
            loss = self.classification_loss(self(batch.source.images), batch.source.labels)
            return self.logged_loss(loss, classification_loss=loss)
        with torch.no_grad():
            source = self.outputs_in("source", batch.source.images)
        target = self.outputs_in("target", batch.target)
        loss = self.alignment_loss(source, target, batch)
        self.watch_target(target.logits)
        return self.logged_loss(self.trade_off * loss, alignment_loss=loss, **self.alignment.diagnostics)

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """Those of the base, by the progress within the stage."""
        share = self.pretraining_share
        within = (progress - share) / (1 - share) if self.adapting else progress / share
        yield from super().complaints(means, within)
