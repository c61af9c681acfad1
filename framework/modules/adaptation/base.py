"""What every domain-adaptation method shares: one forward of both domains, the loss, label-free validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from framework.batch import DomainBatch, LabelledBatch
from framework.errors import ConfigurationError, at_least_zero
from framework.functional import marginal_entropy
from framework.metrics import DomainDiscrepancy, InformationMaximization
from framework.modules.base import ImageClassifier
from framework.networks import NetworkOutputs, convert_domain_specific, select_domain
from framework.networks.batch_norm import running_statistics_kept
from framework.progress import batches_planned, batches_processed

Domain = Literal["source", "target"]
SAME_ON_ALL_PROCESSES = 4095  # a stream of random numbers that is no process's own
BatchNormPolicy = Literal["joint", "separate", "domain_specific"]


class AlignmentLoss(nn.Module):
    """A loss between two domains: ``forward(source, target, progress) -> scalar``.

    Subclasses are plain modules of tensors, usable in any training loop. Their constructors may ask for
    ``num_features`` (``D``), ``num_classes`` (``K``) and, if they send images of their own through the network, for
    ``backbone`` and ``passes`` (:meth:`DomainAdaptation.passes`); everything else has a default.

    Attributes:
        term: the name under which :class:`~framework.modules.adaptation.AlignmentSum` offers the loss, if it does.
        is_task: whether it asks something of predictions or features in each domain by itself, as MCC and rotation do,
            and does not compare the domains.
        diagnostics: what the last forward measured, detached 0-d tensors by name, which are not written to afterwards
            (of a buffer that is, a clone); the base logs them as ``train/…``.
    """

    term: ClassVar[str] = ""
    is_task: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.diagnostics: dict[str, Tensor] = {}

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The loss.

        Args:
            source: features ``[N, D]``, logits ``[N, K]`` and labels ``[N]`` of source images.
            target: features ``[M, D]`` and logits ``[M, K]`` of target images.
            progress: how far the training is, a 0-d tensor in [0, 1].
        """
        raise TypeError(f"{type(self).__name__} has no forward")

    def try_images(self, image_size: int) -> None:
        """Raise a :class:`~framework.errors.ConfigurationError` if the loss cannot take images of this size; only one
        that sends images through the network itself has anything to try."""

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """What is wrong by the diagnostics' means over the last logged steps: a key, and a sentence for the user.

        The sentence says which option to turn; each key is shown once in a run.
        """
        yield from ()


class DomainAdaptation(ImageClassifier):
    """Base of the methods: cross-entropy on the source plus ``trade_off`` times an alignment loss of both domains.

    A method sets ``self.alignment`` and is done; one with a loop of its own overrides ``training_step``. It does not
    train by itself, so that a checkpoint is never mistaken for the base's.

    Args:
        num_classes: number of classes ``K``.
        trade_off: weight of the alignment loss.
        batch_norm: which images share batch statistics in training. ``joint``: one forward of the concatenated batch;
            ``separate``: a forward for each domain, with common weights and running statistics; ``domain_specific``:
            weights and statistics of batch normalisation are each domain's own (Chang et al., CVPR 2019), and the
            target's are used in test and prediction.
        global_alignment: with several processes, align the gathered batch of all of them, as one process with the
            whole batch would; otherwise each its own share.
        bottleneck_features: width ``D`` of the layer whose output is aligned; 0 aligns the backbone's output.
        options: those of :class:`~framework.modules.base.ImageClassifier`.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/target_information_maximization", "max")
    batch_type: ClassVar[type] = DomainBatch
    refused_batch_norm: ClassVar[tuple[str, ...]] = ()
    """Policies that the method has no use for."""

    alignment: AlignmentLoss

    def __init__(
        self,
        num_classes: int,
        *,
        trade_off: float = 1.0,
        batch_norm: BatchNormPolicy = "joint",
        global_alignment: bool = True,
        bottleneck_features: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, bottleneck_features=bottleneck_features, **options)
        at_least_zero("--model.trade_off", trade_off)
        policies = [policy for policy in get_args(BatchNormPolicy) if policy not in self.refused_batch_norm]
        if batch_norm not in policies:
            raise ConfigurationError(
                f"Expected `--model.batch_norm` of {type(self).__name__} to be one of {', '.join(policies)}, but got "
                f"{batch_norm!r}."
            )
        self.trade_off, self.batch_norm, self.global_alignment = trade_off, batch_norm, global_alignment
        if batch_norm == "domain_specific":
            self.backbone = convert_domain_specific(self.backbone)
            self.bottleneck = convert_domain_specific(self.bottleneck)
        self._complained: set[str] = set()
        self._target_batch = num_classes
        self.val_information = InformationMaximization(num_classes)
        self.val_mmd = DomainDiscrepancy()

    def prepare_data(self) -> None:
        """Refuse a run without a planned length too: progress in [0, 1] needs one."""
        super().prepare_data()
        image_size = getattr(self.trainer.datamodule, "image_size", None)  # type: ignore[attr-defined]
        alignment = getattr(self, "alignment", None)
        if self.trainer.state.fn == "fit" and image_size is not None and alignment is not None:
            alignment.try_images(image_size)
        if self.trainer.state.fn == "fit" and self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise ConfigurationError(
                "Expected `--trainer.max_epochs` or `--trainer.max_steps` to bound the run, but both are -1: schedules "
                "of domain adaptation need to know its length."
            )

    def configure_model(self) -> None:
        """Compile the alignment loss too."""
        super().configure_model()
        alignment = getattr(self, "alignment", None)
        if self.compile_networks and alignment is not None and not getattr(alignment, "_compiled_call_impl", None):
            alignment.compile()

    # ------------------------------------------------------------------ training
    @property
    def progress(self) -> Tensor:
        """Batches processed over batches planned, a 0-d tensor in [0, 1]."""
        planned = batches_planned(self.trainer) or 1
        return torch.full((), min(1.0, batches_processed(self.trainer) / planned), device=self.device)

    def outputs_in(self, domain: Domain, images: Tensor) -> NetworkOutputs:
        """Outputs of images that all come from one domain."""
        if self.batch_norm != "domain_specific":
            return self.outputs(images)
        select_domain(self, domain)
        outputs = self.outputs(images)
        select_domain(self, "target")  # what inference uses
        return outputs

    def domain_outputs(self, source: Tensor, target: Tensor) -> tuple[NetworkOutputs, NetworkOutputs]:
        """Outputs of source ``[N, 3, H, W]`` and target images ``[M, 3, H, W]`` under the batch-norm policy."""
        if self.batch_norm == "joint":
            return self.outputs(torch.cat([source, target])).split(len(source))
        return self.outputs_in("source", source), self.outputs_in("target", target)

    def passes(self, images: list[Tensor]) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
        """The passes through the backbone that other images of both domains, or of the target alone, take under the
        batch-norm policy, each with its images; they leave running statistics alone."""
        if self.batch_norm == "joint":
            return [(partial(self._features_in, "target"), torch.cat(images))]
        domains: tuple[Domain, ...] = ("source", "target") if len(images) == 2 else ("target",)
        return [(partial(self._features_in, domain), part) for domain, part in zip(domains, images, strict=True)]

    def _features_in(self, domain: Domain, images: Tensor) -> Tensor:
        select_domain(self.backbone, domain)
        with running_statistics_kept(self.backbone):
            features: Tensor = self.backbone(images)
        select_domain(self.backbone, "target")  # what inference uses
        return features

    def gathered(self, outputs: NetworkOutputs) -> NetworkOutputs:
        """The outputs of all processes, with gradients; DDP's mean then equals the single process's gradient."""
        if not self.global_alignment or self.trainer.world_size == 1:
            return outputs
        return NetworkOutputs(*(None if tensor is None else self.of_all_processes(tensor) for tensor in outputs))  # type: ignore[arg-type]

    def training_step(self, batch: DomainBatch, batch_idx: int) -> Tensor | None:
        """Classification on the source plus alignment of the domains."""
        source, target = self.domain_outputs(batch.source.images, batch.target)
        classification_loss = self.classification_loss(source.logits, batch.source.labels)
        alignment_loss = self.alignment_loss(source, target, batch)
        self.watch_target(target.logits)
        return self.logged_loss(
            torch.add(classification_loss, alignment_loss, alpha=self.trade_off),
            classification_loss=classification_loss,
            alignment_loss=alignment_loss,
            **self.alignment.diagnostics,
        )

    def alignment_loss(self, source: NetworkOutputs, target: NetworkOutputs, batch: DomainBatch) -> Tensor:
        """The method's loss of a step's outputs; logs the norm of its gradient where it reaches the features,
        every ``log_every_n_steps``."""
        source, target = self.to_align(source, target, batch)
        if self._means.due(self.trainer):
            source, target = self._observed(source, "source"), self._observed(target, "target")
        loss: Tensor = self.alignment(source, target, self.progress)
        return loss

    def to_align(
        self, source: NetworkOutputs, target: NetworkOutputs, batch: DomainBatch
    ) -> tuple[NetworkOutputs, NetworkOutputs]:
        """What an alignment loss takes: the outputs of all processes, with labels, domains and images; draws that
        follow are the same on all of them."""
        labels = batch.source.labels
        domains = batch.source.domains
        if not isinstance(domains, Tensor):  # where it is not said
            domains = torch.full_like(labels, domains)
        source = self.gathered(NetworkOutputs(source.features, source.logits, labels, domains))
        target = self.gathered(target)
        self.reseed(SAME_ON_ALL_PROCESSES)  # what the loss draws, on the same gathered batch
        return (
            NetworkOutputs(*source[:-1], images=batch.source.images),
            NetworkOutputs(target.features, target.logits, images=batch.target),
        )

    def _observed(self, outputs: NetworkOutputs, domain: Domain) -> NetworkOutputs:
        # views, whose gradients are the alignment's alone: behind a gradient reversal, what comes through it
        views = {}
        for part in ("features", "logits"):
            tensor: Tensor = getattr(outputs, part)
            if tensor.requires_grad:
                views[part] = view = tensor.view_as(tensor)
                name = f"train/alignment_gradient_norm/{domain}_{part}"
                view.register_hook(lambda gradient, name=name: self._means.add({name: gradient.float().norm()}))  # type: ignore[no-untyped-call]
        return outputs._replace(**views)

    def watch_target(self, logits: Tensor) -> None:
        """Log the entropy, in nats, of the mean prediction of a batch of target logits ``[M, K]``: log K where all
        classes are predicted alike often, 0 where all images get one class."""
        self._target_batch = len(logits)
        self._means.add_measured("train/target_marginal_entropy", marginal_entropy, logits.detach())

    def on_running_means(self, means: dict[str, float]) -> None:
        """Warn, once for each kind, where the means say that the method does not work."""
        processed, planned = batches_processed(self.trainer), batches_planned(self.trainer) or 1
        for key, sentence in self.complaints(means, processed / planned):
            if key not in self._complained:
                self._complained.add(key)
                rank_zero_warn(f"At batch {processed:,} of {planned:,}: {sentence}", category=UserWarning)

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """What is wrong by the running means, a key and a sentence that says what to turn."""
        classes = math.exp(means.get("train/target_marginal_entropy", math.inf))
        most = min(self.num_classes, self._target_batch)
        if progress >= 0.2 and classes < max(1.1, most / 3):
            found = f"{classes:.1f} of {self.num_classes} by the entropy of their mean"
            yield (
                "collapse",
                f"the predictions of target images are collapsing to few classes, {found} "
                "(`train/target_marginal_entropy`). If the target's classes are not that unbalanced, lower "
                "`--model.trade_off` or `--model.learning_rate`, or train longer.",
            )
        loss = means.get("train/classification_loss", 0.0)
        if progress >= 0.3 and loss > 0.9 * math.log(self.num_classes):
            yield (
                "source",
                (
                    f"the source is not learned, `train/classification_loss` is {loss:.2f} where guessing gives "
                    f"{math.log(self.num_classes):.2f}. Lower `--model.trade_off`, or change `--model.learning_rate`."
                ),
            )
        alignment = getattr(self, "alignment", None)
        if alignment is not None:
            yield from alignment.complaints(means, progress)

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Accuracy on labelled source images; label-free scores on target images."""
        if isinstance(batch, LabelledBatch):
            outputs = self.outputs_in("source", batch.images)
            self.val_accuracy.update(outputs.logits, batch.labels)
            self.log("val/source_accuracy", self.val_accuracy, add_dataloader_idx=False, prog_bar=True)
            self.val_mmd.update(outputs.features, "source")
        else:
            outputs = self.outputs_in("target", batch)
            self.val_information.update(outputs.logits)
            self.val_mmd.update(outputs.features, "target")

    def on_validation_epoch_end(self) -> None:
        """Label-free scores of the target, and the distance of the domains' features."""
        self.log("val/target_information_maximization", self.val_information, prog_bar=True)
        self.log("val/mmd", self.val_mmd)
