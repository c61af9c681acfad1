"""A pretrained backbone on a new task: which parts of it learn, when, and at what rate."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from framework.errors import ConfigurationError, did_you_mean, in_range
from framework.modules.base import ImageClassifier
from framework.modules.transfer.unfreezing import (
    MILESTONES,
    check_bounded,
    check_milestones,
    may_skip_backward,
    milestones,
    run_progress,
    unfrozen_stages,
)
from framework.networks import split_stages
from framework.networks.batch_norm import batch_norms
from framework.networks.lora import add_adapters

Policy = Literal["full", "frozen", "gradual", "lp_ft", "lora"]
BatchNorm = Literal["train", "source_statistics", "frozen"]
LORA_DEFAULTS: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.0, "lora_targets": None}


class TransferClassifier(ImageClassifier):
    """A pretrained backbone with a new head, fine-tuned whole, in part, step by step, or kept frozen.

    What is frozen is in evaluation mode and bit for bit what it was, its batch-norm statistics too, and no optimizer
    sees a gradient of it: neither weight decay nor momentum moves it, and none is saved up for the unfreezing.
    Bottleneck and head always learn. A stage is a part of the backbone as
    :func:`~framework.networks.split_stages` finds it.

    What is frozen at a batch depends on the share of the run that is over, and on nothing else. On one device, and with
    ``--trainer.strategy ddp_find_unused_parameters_true``, the backward pass ends where the frozen part begins; a plain
    ddp, which waits for every gradient, computes those of the frozen part and drops them. With ``compile`` the backbone
    is compiled anew at each milestone.

    Args:
        num_classes: number of classes ``K``.
        policy: ``full``: all parts learn, the backbone at ``backbone_learning_rate_factor``. ``frozen``: the backbone
            never does (linear probe). ``gradual``: its stages begin to learn one after the other, the last one first
            (Howard and Ruder 2018). ``lp_ft``: frozen, then full (Kumar et al. 2022). ``lora``: it stays as it is, and
            low-rank adapters beside its linear layers learn at the rate of new layers (Hu et al. 2021; extra ``lora``).
        unfreeze_at: milestones of ``gradual`` and ``lp_ft``, shares of the run's batches in (0, 1), increasing. At the
            k-th the k-th stage from the output begins to learn, at the last one all that are left. Default: 0.1, 0.2,
            0.3, 0.4 and 0.5 (as many as there are stages); 0.5 for ``lp_ft``, which has one.
        layer_decay: each stage learns at this multiple of the rate of the next one towards the output, in (0, 1].
        batch_norm: in the parts of the backbone that learn. ``train``: batch statistics, as in training from scratch.
            ``source_statistics``: it normalises with the pretrained running statistics, which stay as they are; scale
            and shift learn. ``frozen``: they do not either.
        lora_rank: rank ``r`` of the adapters.
        lora_alpha: the adapters count ``lora_alpha / lora_rank``.
        lora_dropout: dropout probability of the adapters' inputs.
        lora_targets: ends of the names of the layers with adapters, such as ``[qkv, proj]``; default: all linear layers
            that can have one, see :func:`~framework.networks.lora.add_adapters`.
        options: those of :class:`~framework.modules.base.ImageClassifier`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        policy: Policy = "full",
        unfreeze_at: list[float] | None = None,
        layer_decay: float = 1.0,
        batch_norm: BatchNorm = "train",
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_targets: list[str] | None = None,
        **options: Any,
    ) -> None:
        _check_choice("--model.policy", policy, get_args(Policy))
        _check_choice("--model.batch_norm", batch_norm, get_args(BatchNorm))
        check_milestones(policy, unfreeze_at)
        _check_layer_decay(layer_decay, policy)
        _check_lora(
            policy,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            lora_targets=lora_targets,
        )
        super().__init__(num_classes, **options)
        self.policy, self.layer_decay, self.batch_norm = policy, layer_decay, batch_norm
        self.unfrozen: int | None = None  # stages that learn, counted from the output; None outside of a run: all
        self.skips_backward = True
        name = str(self.hparams["backbone"])
        if policy == "frozen":
            self.backbone.requires_grad_(False)
        if policy == "lora":
            add_adapters(
                self.backbone, name, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=lora_targets
            )
        if policy in MILESTONES:
            names = [stage.name for stage in split_stages(self.backbone)]
            self.milestones, self.num_stages = milestones(policy, unfreeze_at, names), len(names)
        if batch_norm != "train" and not batch_norms(self.backbone):
            raise ConfigurationError(
                f"Expected `--model.batch_norm` to be 'train' for {name!r}, which has no batch normalisation, but got "
                f"{batch_norm!r}."
            )
        if batch_norm == "frozen":
            for layer in batch_norms(self.backbone):
                layer.requires_grad_(False)
        self.train()

    # ------------------------------------------------------------------ what is frozen
    def train(self, mode: bool = True) -> TransferClassifier:
        """Training mode, but for what is frozen: in training mode its batch statistics would change the features."""
        super().train(mode)
        if mode and hasattr(self, "skips_backward"):
            self._keep_frozen_in_evaluation_mode()
        return self

    def _keep_frozen_in_evaluation_mode(self) -> None:
        frozen, _ = self._parts()
        for module in frozen:
            module.eval()
        if self.batch_norm != "train" or self.policy == "lora":
            for layer in batch_norms(self.backbone):
                layer.eval()

    def _parts(self) -> tuple[list[nn.Module], set[nn.Parameter]]:
        """The modules and the parameters of the backbone that are frozen now."""
        if self.policy == "frozen" or (self.policy in MILESTONES and self.unfrozen == 0):
            return [self.backbone], set(self.backbone.parameters())
        if self.policy not in MILESTONES or self.unfrozen is None:
            return [], set()
        stages = split_stages(self.backbone)
        frozen = stages[: len(stages) - self.unfrozen]
        return [m for stage in frozen for m in stage.modules], {p for stage in frozen for p in stage.parameters}

    def _unfreeze(self, stages: int | None) -> None:
        """Let the last ``stages`` stages learn and freeze those before them; None lets all learn."""
        if stages == self.unfrozen:
            return
        self.unfrozen = stages
        _, frozen = self._parts()
        layers = batch_norms(self.backbone) if self.batch_norm == "frozen" else []
        never = {parameter for layer in layers for parameter in layer.parameters()}
        for parameter in set(self.backbone.parameters()) - never:
            parameter.requires_grad_(parameter not in frozen or not self.skips_backward)
            if parameter in frozen:
                parameter.grad = None
        self.backbone.train(self.training)
        if self.training:
            self._keep_frozen_in_evaluation_mode()

    def prepare_data(self) -> None:
        """Refuse a run of unknown length where stages are unfrozen at shares of it."""
        super().prepare_data()
        if self.policy in MILESTONES and self.trainer.state.fn == "fit":
            check_bounded(self.trainer, self.policy)

    def setup(self, stage: str) -> None:
        """Everything asks for gradients until the first batch: a DDP that is told to look for those that are missing
        never looks for a parameter that asked for none when it was set up."""
        super().setup(stage)
        if self.policy in MILESTONES:
            self._unfreeze(None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Freeze what is to be frozen in this batch."""
        super().on_train_batch_start(batch, batch_idx)
        if self.policy in MILESTONES:
            self.skips_backward = may_skip_backward(self.trainer)
            self._unfreeze(unfrozen_stages(run_progress(self.trainer), self.milestones, self.num_stages))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of the frozen part where it could not be left out of the backward pass."""
        if self.policy in MILESTONES and not self.skips_backward:
            for parameter in self._parts()[1]:
                parameter.grad = None
        super().on_before_optimizer_step(optimizer)

    def on_train_end(self) -> None:
        """A run that stopped early leaves nothing frozen behind."""
        super().on_train_end()
        if self.policy in MILESTONES:
            self._unfreeze(None)

    # ------------------------------------------------------------------ at what rate
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of every classifier; the backbone's is one for each of its stages where they do not learn alike, or one
        of its adapters."""
        groups = []
        for group in super().parameter_groups():
            if group["name"] != "backbone" or (self.policy in ("full", "lp_ft") and self.layer_decay == 1):
                groups.append(group)
            elif self.policy == "lora":
                rate = self.learning_rate * self.learning_rate_factor("adapters")
                groups.append({**group, "name": "adapters", "lr": rate})
            else:
                groups += self._stage_groups(group)
        return groups

    def _stage_groups(self, backbone: dict[str, Any]) -> list[dict[str, Any]]:
        groups = []
        stages = split_stages(self.backbone)
        for above, stage in zip(reversed(range(len(stages))), stages, strict=True):
            parameters = [parameter for parameter in stage.parameters if parameter.requires_grad]
            if parameters:
                rate = backbone["lr"] * self.layer_decay**above
                groups.append({**backbone, "params": parameters, "lr": rate, "name": f"backbone/{stage.name}"})
        return groups


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(choices)
        raise ConfigurationError(
            f"Expected `{flag}` to be one of {listed}, but got {value!r}. {did_you_mean(str(value), choices)}"
        )


def _check_layer_decay(layer_decay: float, policy: str) -> None:
    if not 0 < layer_decay <= 1:
        raise ConfigurationError(f"Expected `--model.layer_decay` to be above 0 and at most 1, but got {layer_decay}.")
    if layer_decay != 1 and policy in ("frozen", "lora"):
        raise ConfigurationError(
            f"Expected `--model.layer_decay` to be 1 with `--model.policy {policy}`, under which no stage of the "
            f"backbone learns, but got {layer_decay}."
        )


def _check_lora(policy: str, **values: Any) -> None:
    for name, value in values.items():
        if policy != "lora" and value != LORA_DEFAULTS[name]:
            raise ConfigurationError(
                f"Expected `--model.{name}` with `--model.policy lora`, but got {value!r} with {policy!r}."
            )
    if values["lora_rank"] < 1:
        raise ConfigurationError(f"Expected `--model.lora_rank` to be at least 1, but got {values['lora_rank']}.")
    if values["lora_alpha"] <= 0:
        raise ConfigurationError(f"Expected `--model.lora_alpha` to be above 0, but got {values['lora_alpha']}.")
    in_range("--model.lora_dropout", values["lora_dropout"], 0, 1)
