"""Optimizers, parameter groups and schedules, as a real Trainer applies them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from framework import DANN, ImageFolderDataModule, ResidualClassifier, Trainer, TransferClassifier
from framework.errors import ConfigurationError


@pytest.fixture
def data(images: Callable[..., Path], tmp_path: Path) -> ImageFolderDataModule:
    images(tmp_path, ["a", "b"], count=4)
    return ImageFolderDataModule(
        str(tmp_path), batch_size=2, steps_per_epoch=6, image_size=8, crop="none", num_workers=0, val_fraction=0.0
    )


class Rates(L.Callback):
    """The rate of each group at each optimizer step."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            self.seen.setdefault(group["name"], []).append(group["lr"])


def rates(data: ImageFolderDataModule, trainer: dict[str, Any] | None = None, **options: Any) -> dict[str, list[float]]:
    callback = Rates()
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
        "limit_val_batches": 0,
    }
    model = TransferClassifier(2, backbone="resnet8", learning_rate=0.02, bottleneck_features=4, **options)
    Trainer(callbacks=callback, **{**defaults, **(trainer or {})}).fit(model, data)
    return callback.seen


def check(seen: dict[str, list[float]], factors: list[float]) -> None:
    assert set(seen) == {"backbone", "bottleneck", "head"}
    assert seen["head"] == pytest.approx([0.02 * factor for factor in factors], rel=1e-6)
    assert seen["bottleneck"] == pytest.approx(seen["head"])
    assert seen["backbone"] == pytest.approx([0.1 * rate for rate in seen["head"]])


def test_constant(data: ImageFolderDataModule) -> None:
    check(rates(data), [1.0] * 12)


@pytest.mark.parametrize(("gamma", "beta"), [(0.001, 0.75), (0.5, 2.0)])
def test_inverse_decay(data: ImageFolderDataModule, gamma: float, beta: float) -> None:
    options = {} if gamma == 0.001 else {"schedule_options": {"gamma": gamma, "beta": beta}}
    check(rates(data, schedule="inverse_decay", **options), [(1 + gamma * i) ** -beta for i in range(12)])


def cosine(i: int, total: int, warmup: int = 0, minimum: float = 0.0) -> float:
    if i < warmup:
        return (i + 1) / (warmup + 1)
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * (i - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize(("warmup", "minimum"), [(0, 0.0), (3, 0.1)])
def test_cosine_spans_the_run(data: ImageFolderDataModule, warmup: int, minimum: float) -> None:
    seen = rates(data, schedule="cosine", schedule_options={"warmup": warmup, "minimum": minimum})
    check(seen, [cosine(i, 12, warmup, minimum) for i in range(12)])


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"limit_train_batches": 4}, 8),
        ({"limit_train_batches": 0.5}, 6),
        ({"accumulate_grad_batches": 2}, 6),
        ({"accumulate_grad_batches": 4}, 4),  # 4 and the 2 that are left, twice
    ],
)
def test_cosine_counts_optimizer_steps(data: ImageFolderDataModule, trainer: dict[str, Any], steps: int) -> None:
    check(rates(data, trainer, schedule="cosine"), [cosine(i, steps) for i in range(steps)])


def test_step(data: ImageFolderDataModule) -> None:
    seen = rates(data, schedule="step", schedule_options={"milestones": [3, 8], "factor": 0.5})
    check(seen, [1.0] * 3 + [0.5] * 5 + [0.25] * 4)
    seen = rates(data, schedule="step", schedule_options={"milestones": [5]})
    check(seen, [1.0] * 5 + [0.1] * 7)


def test_schedules_do_not_start_anew_on_resume(data: ImageFolderDataModule, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    options: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    }
    seen = []
    for callback, checkpoint in ((Save(), None), (L.Callback(), tmp_path / "run.ckpt")):
        watch = Rates()
        model = ResidualClassifier(2, backbone="resnet8", schedule="cosine")
        Trainer(callbacks=[watch, callback], **options).fit(model, data, ckpt_path=checkpoint)
        seen.append(watch.seen["head"])
    assert seen[1] == seen[0][5:]
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)["lr_schedulers"]


# ---------------------------------------------------------------------- groups
def test_every_parameter_is_in_one_group() -> None:
    for model in (
        ResidualClassifier(2, backbone="resnet8"),
        TransferClassifier(2, backbone="resnet8", bottleneck_features=4),
        DANN(2, backbone="resnet8", bottleneck_features=4),
    ):
        grouped = [id(p) for group in model.parameter_groups() for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())
        assert all(group["params"] for group in model.parameter_groups())


def test_groups_of_each_kind_of_module() -> None:
    def shown(model: Any) -> dict[str, float]:
        return {group["name"]: round(group["lr"], 6) for group in model.parameter_groups()}

    assert shown(ResidualClassifier(2, backbone="resnet8")) == {"backbone": 0.1, "head": 0.1}
    assert shown(TransferClassifier(2, backbone="resnet8", backbone_learning_rate_factor=0.0)) == {
        "backbone": 0.0,
        "head": 0.01,
    }
    assert shown(DANN(2, backbone="resnet8", bottleneck_features=4)) == {
        "backbone": 0.001,
        "bottleneck": 0.01,
        "head": 0.01,
        "alignment": 0.01,
    }


# ---------------------------------------------------------------------- optimizers
def optimizer(**options: Any) -> torch.optim.Optimizer:
    model = TransferClassifier(2, backbone="resnet8", **options)
    configured = model.configure_optimizers()
    assert isinstance(configured, torch.optim.Optimizer)
    return configured


def test_sgd_by_default() -> None:
    made = optimizer(weight_decay=0.003)
    assert type(made) is torch.optim.SGD
    for group in made.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0.003)


@pytest.mark.parametrize(
    ("name", "cls"), [("AdamW", torch.optim.AdamW), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_names_are_those_of_torch(name: str, cls: type) -> None:
    assert type(optimizer(optimizer=name)) is cls


def test_options_of_the_optimizer() -> None:
    made = optimizer(optimizer="Adam", optimizer_options={"betas": [0.5, 0.9], "amsgrad": True}, weight_decay=0.0)
    assert all(tuple(group["betas"]) == (0.5, 0.9) and group["amsgrad"] for group in made.param_groups)
    plain = optimizer(optimizer_options={"momentum": 0.5, "nesterov": False})
    assert all(group["momentum"] == 0.5 and not group["nesterov"] for group in plain.param_groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": "AdamV"},
            "`--model.optimizer` to be an optimizer of torch.optim, but got 'AdamV'. Did you mean",
        ),
        ({"optimizer": "Adam", "optimizer_options": {"momentum": 0.9}}, "option of Adam, but got 'momentum'"),
        ({"optimizer_options": {"momentun": 0.9}}, "but got 'momentun'. Did you mean 'momentum'"),
        ({"optimizer_options": {"momentum": -1.0}}, "`--model.optimizer_options` that SGD takes"),
        ({"optimizer_options": {"lr": 0.5}}, "but got 'lr'"),
        ({"schedule": "cosin"}, "`--model.schedule` to be one of constant, inverse_decay, cosine, step"),
        ({"schedule": "cosine", "schedule_options": {"gamma": 1}}, r"options of 'cosine' \(warmup, minimum\)"),
        ({"schedule_options": {"gamma": 1}}, r"options of 'constant' \(none\), but got 'gamma'"),
        ({"schedule": "step"}, "`--model.schedule_options.milestones` to list optimizer steps"),
        ({"backbone_learning_rate_factor": -1.0}, "`--model.backbone_learning_rate_factor` to be 0 or more"),
    ],
)
def test_mistakes_name_the_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        optimizer(**options)


def test_gradients_are_forgotten() -> None:
    """By hand for the optimizer that the module has built; one of a strategy's own, which may keep them elsewhere, does
    it itself."""

    class Own(torch.optim.SGD):
        asked = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.asked += 1

    module = ResidualClassifier(2, backbone="resnet8")
    module(torch.randn(2, 3, 16, 16)).sum().backward()
    own = Own(module.parameters())
    module.optimizer_zero_grad(0, 0, own)
    assert own.asked == 1
    assert all(parameter.grad is not None for parameter in module.parameters())
    made = module.configure_optimizers()
    assert isinstance(made, torch.optim.SGD)
    module.optimizer_zero_grad(0, 0, made)
    assert all(parameter.grad is None for parameter in module.parameters())
