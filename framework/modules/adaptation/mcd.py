"""Maximum classifier discrepancy: two heads that find target images off the source, features that leave none.

Saito et al., "Maximum Classifier Discrepancy for Unsupervised Domain Adaptation", CVPR 2018, arXiv:1712.02560.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from framework.batch import DomainBatch
from framework.errors import ConfigurationError, at_least_zero, in_range
from framework.functional import class_balance, classifier_discrepancy
from framework.modules.adaptation.base import SAME_ON_ALL_PROCESSES, Domain, DomainAdaptation
from framework.networks import MLPHead, NetworkOutputs, convert_domain_specific, select_domain

Logits = tuple[Tensor, Tensor]  # of the two heads


class MCD(DomainAdaptation):
    """Maximum classifier discrepancy (Saito et al., CVPR 2018), section 3.3: three steps on every batch.

    A: both heads and the features learn the source. B: the heads learn the source and to differ on the target. C,
    several times: the features learn to make the heads agree on the target.

    The heads see the features of all processes at once where ``global_alignment`` is on. ``head`` is the one of
    validation, test, prediction and export. Needs ``--trainer.strategy ddp_find_unused_parameters_true`` with several
    processes; gradients are neither clipped nor accumulated. ``compile`` compiles the backbone; the rest of the loop is
    three small losses between updates, nothing that a graph could hold together.

    With SGD, backbone and bottleneck learn without momentum, as in the paper's code and TLlib: a buffer common to the
    steps would repeat the gradient of step A in every step C after it.

    Logs ``train/discrepancy`` of the last step C, ``train/discrepancy_of_heads`` that step B left, before C, and
    ``train/head_agreement``, the share of target images for which both heads then predict one class.

    Args:
        num_classes: number of classes ``K``.
        generator_steps: how often step C is done.
        class_balance: weight of the term that spreads the target's predictions over the classes, in A and B.
        classifier_features: width of the heads' hidden layers; 0 for linear heads.
        classifier_layers: number of hidden layers of each head.
        classifier_dropout: dropout probability after each of them.
        classifier_normalization: in the heads, ``batch`` (the paper's code on photographs) or ``none``.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`; ``trade_off`` weighs the discrepancy.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        generator_steps: int = 4,
        class_balance: float = 0.0,
        classifier_features: int = 1024,
        classifier_layers: int = 2,
        classifier_dropout: float = 0.5,
        classifier_normalization: Literal["batch", "none"] = "none",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        if generator_steps < 1:
            raise ConfigurationError(f"Expected `--model.generator_steps` to be at least 1, but got {generator_steps}.")
        at_least_zero("--model.class_balance", class_balance)
        at_least_zero("--model.classifier_features", classifier_features)
        at_least_zero("--model.classifier_layers", classifier_layers)
        in_range("--model.classifier_dropout", classifier_dropout, 0, 1)
        if classifier_normalization not in ("batch", "none"):
            raise ConfigurationError(
                f"Expected `--model.classifier_normalization` to be 'batch' or 'none', but got "
                f"{classifier_normalization!r}."
            )
        self.automatic_optimization = False
        self.generator_steps, self.class_balance = generator_steps, class_balance

        def head(name: str) -> nn.Module:
            network = MLPHead(
                self.num_features,
                num_classes,
                classifier_features,
                classifier_dropout,
                classifier_normalization,
                classifier_layers,
            )
            network = self.started(name, network)
            return convert_domain_specific(network) if self.batch_norm == "domain_specific" else network

        # they must not start alike
        self.head, self.second_head = head("head"), head("second_head")  # type: ignore[assignment]

    def prepare_data(self) -> None:
        """Refuse a DDP that waits for gradients of parameters that a step leaves alone."""
        super().prepare_data()
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise ConfigurationError(
                "Expected `--trainer.strategy` to be ddp_find_unused_parameters_true or another that finds them, since "
                f"each step of {type(self).__name__} trains a part of the network, but got a plain DDP."
            )

    # ------------------------------------------------------------------ the three steps
    def training_step(self, batch: DomainBatch, batch_idx: int) -> Tensor:
        """Steps A, B and C of a batch; the learning rate's schedule counts batches."""
        labels = self._everywhere(batch.source.labels)
        domains: tuple[Domain, ...] = ("source", "target") if self.class_balance else ("source",)

        # A: all learn the source
        features = self._features(batch, domains)
        with self._drawn_alike(0):
            classification_loss = self._source_loss(self._logits(features), labels)
        self._update(classification_loss)
        self._count_no_more_steps()

        # B: the heads, on features as they are
        features = self._features_for_heads(batch)
        with self._drawn_alike(1):
            logits = self._logits({domain: each.detach() for domain, each in features.items()})
            loss = self._source_loss(logits, labels) - self.trade_off * self.discrepancy(*logits["target"])
        self._update(loss)

        # C: backbone and bottleneck; in B they did not change, so that the first C goes on with B's features
        if self.batch_norm != "joint":
            del features["source"]
        found = []
        for step in range(self.generator_steps):
            if step:
                features = self._features(batch, ("target",))
            with self._frozen_heads():
                if self._means.due(self.trainer):
                    features["target"] = self._observed_target(features["target"])
                with self._drawn_alike(2 + step):
                    logits = self._logits(features)
                    found.append(self.discrepancy(*logits["target"]))
                self._update(self.trade_off * found[-1])
            if step == 0:
                first, second = (head.detach() for head in logits["target"])
        schedule = self.lr_schedulers()
        if isinstance(schedule, LRScheduler):
            schedule.step()
        self.watch_target(first)
        return self.logged_loss(
            classification_loss.detach() + self.trade_off * found[-1].detach(),
            classification_loss=classification_loss / 2,  # of a head
            discrepancy=found[-1],
            discrepancy_of_heads=found[0],
            head_agreement=(first.argmax(dim=1) == second.argmax(dim=1)).float().mean(),
        )

    def discrepancy(self, first: Tensor, second: Tensor) -> Tensor:
        """Of the two heads' logits ``[M, K]`` on the target, a scalar."""
        return classifier_discrepancy(first, second)

    def _source_loss(self, logits: dict[Domain, Logits], labels: Tensor) -> Tensor:
        first, second = logits["source"]
        loss = self.classification_loss(first, labels) + self.classification_loss(second, labels)
        if self.class_balance:
            loss = loss + self.class_balance * sum(class_balance(head) for head in logits["target"])
        return loss

    def _features(self, batch: DomainBatch, domains: tuple[Domain, ...]) -> dict[Domain, Tensor]:
        """Features of the domains asked for, of all processes; with joint batch statistics always of both."""
        images: dict[Domain, Tensor] = {"source": batch.source.images, "target": batch.target}
        if self.batch_norm == "joint":
            features = self.bottleneck(self.backbone(torch.cat([images["source"], images["target"]])))
            parts = features.split([len(images["source"]), len(images["target"])])
            return {"source": self._everywhere(parts[0]), "target": self._everywhere(parts[1])}
        found = {}
        for domain in domains:
            select_domain(self, domain)
            found[domain] = self._everywhere(self.bottleneck(self.backbone(images[domain])))
        select_domain(self, "target")  # what inference uses
        return found

    def _features_for_heads(self, batch: DomainBatch) -> dict[Domain, Tensor]:
        """Features of both domains; where each has its own batch statistics, the source's need no graph."""
        if self.batch_norm == "joint":
            return self._features(batch, ("source", "target"))
        with torch.no_grad():
            source = self._features(batch, ("source",))
        return source | self._features(batch, ("target",))

    def _observed_target(self, features: Tensor) -> Tensor:
        return self._observed(NetworkOutputs(features, features.detach()), "target").features

    def _logits(self, features: dict[Domain, Tensor]) -> dict[Domain, Logits]:
        """Both heads' logits of the features given, under the batch-norm policy too."""
        if self.batch_norm == "joint":
            joint = torch.cat([features["source"], features["target"]])
            count = len(features["source"])
            first, second = self.head(joint), self.second_head(joint)
            return {"source": (first[:count], second[:count]), "target": (first[count:], second[count:])}
        found = {}
        for domain in features:
            select_domain(self, domain)
            found[domain] = (self.head(features[domain]), self.second_head(features[domain]))
        select_domain(self, "target")
        return found

    # ------------------------------------------------------------------ how a step is made
    def parameter_groups(self) -> list[dict[str, Any]]:
        """As every method's, but for the momentum of what step C trains."""
        groups = super().parameter_groups()
        if issubclass(self.optimizer_class, torch.optim.SGD):
            for group in groups:
                if group["name"] in ("backbone", "bottleneck"):
                    group |= {"momentum": 0.0, "nesterov": False}
        return groups

    def _update(self, loss: Tensor) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad(set_to_none=True)  # what has no gradient is left alone, by momentum and weight decay too
        self.manual_backward(loss)
        optimizer.step()

    def _count_no_more_steps(self) -> None:
        # `trainer.global_step` and `--trainer.max_steps` count batches; Lightning sets these anew before each batch
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure

    @contextmanager
    def _frozen_heads(self) -> Iterator[None]:
        parameters = [*self.head.parameters(), *self.second_head.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _everywhere(self, tensor: Tensor) -> Tensor:
        return self.of_all_processes(tensor) if self.global_alignment else tensor

    @contextmanager
    def _drawn_alike(self, draw: int) -> Iterator[None]:
        """What is drawn inside is the same on all processes; each goes on with its own numbers outside."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.reseed(SAME_ON_ALL_PROCESSES - draw)
            yield

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """Heads that disagree to the end: the features did not follow."""
        yield from super().complaints(means, progress)
        agreement = means.get("train/head_agreement", 1.0)
        if progress >= 0.5 and agreement < 0.5:
            yield (
                "heads",
                f"the two heads agree on {agreement:.0%} of the target images only (`train/head_agreement`): the "
                "features do not follow the heads. Raise `--model.generator_steps`, or lower `--model.trade_off`.",
            )
