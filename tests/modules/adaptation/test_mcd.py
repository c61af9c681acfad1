"""The three steps of MCD: what each trains, on which images, how often, and against a plain loop."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import contract
import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from framework.batch import DomainBatch, LabelledBatch
from framework.errors import ConfigurationError
from framework.modules import MCD, SWD, DomainAdaptation
from framework.networks import MLPHead
from framework.progress import batches_planned
from framework.trainer import Trainer

ONE_EPOCH: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0}


class Steps(L.Callback):
    """Per optimizer step: which parts have gradients, and what their parameters are."""

    def __init__(self) -> None:
        self.parts: list[set[str]] = []
        self.rates: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        with_gradient = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None}
        self.parts.append(with_gradient)
        self.rates.append(optimizer.param_groups[2]["lr"])
        self.weights.append({name: p.detach().clone() for name, p in module.named_parameters()})


HEADS, FEATURES = {"head", "second_head"}, {"backbone", "bottleneck"}


@pytest.mark.parametrize("policy", ["joint", "separate", "domain_specific"])
def test_each_step_trains_its_parts_and_leaves_the_others_alone(policy: str, domains: Path) -> None:
    steps = Steps()
    contract.fit(MCD, domains, model={"batch_norm": policy, "generator_steps": 2}, callbacks=[steps], **ONE_EPOCH)
    assert steps.parts == [HEADS | FEATURES, HEADS, FEATURES, FEATURES] * 5
    for index in range(len(steps.parts) - 1):
        before, after = steps.weights[index], steps.weights[index + 1]
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == steps.parts[index]  # not by momentum or weight decay either


def test_step_c_does_not_repeat_the_gradient_of_step_a(domains: Path) -> None:
    """As a momentum that the steps share would, four times a batch: the features then learn the source only faster."""

    def trained(steps: int) -> Any:
        options = {"generator_steps": steps, "trade_off": 0.0, "batch_norm": "separate"}
        return contract.fit(MCD, domains, model={**options, "weight_decay": 0.0, "schedule": "constant"}, **ONE_EPOCH)

    few, many = trained(1), trained(4)
    for (name, mine), theirs in zip(few.named_parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")
    assert {group["name"]: group["momentum"] for group in few.optimizers().param_groups} == {
        "backbone": 0.0,
        "bottleneck": 0.0,
        "head": 0.9,
        "second_head": 0.9,
    }
    contract.fit(MCD, domains, model={"optimizer": "Adam"}, **ONE_EPOCH)  # it has no momentum to leave out


@pytest.mark.parametrize(
    ("policy", "images"),
    [("joint", [8, 8, 8, 8]), ("separate", [4, 4, 4, 4, 4]), ("domain_specific", [4, 4, 4, 4, 4])],
)
def test_no_forward_is_wasted(policy: str, images: list[int], domains: Path) -> None:
    """One for A, one of both domains for B and the first C together, one for each further C. TLlib has six."""
    module = contract.build_model(MCD, batch_norm=policy, generator_steps=3)
    seen: list[int] = []
    module.backbone.register_forward_hook(lambda network, inputs, outputs: seen.append(len(inputs[0])))
    trainer = Trainer(
        **ONE_EPOCH, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, contract.build_data(domains, steps_per_epoch=1))
    assert seen == images


def points(module: MCD) -> MCD:
    """The method on points of the plane, with a linear map in place of the backbone."""
    torch.manual_seed(0)
    module.backbone, module.bottleneck = nn.Linear(2, module.num_features), nn.Identity()
    return module


def fit(module: MCD, batches: list[DomainBatch], **options: Any) -> MCD:
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    L.Trainer(**{**defaults, **options}, enable_progress_bar=False, log_every_n_steps=1).fit(module, loader)
    return module


def batch(source: int = 6, target: int = 8) -> DomainBatch:
    images = LabelledBatch(torch.randn(source, 2), torch.arange(source) % 3)
    return DomainBatch(images, torch.randn(target, 2) + 1)


@pytest.mark.parametrize("policy", ["joint", "separate"])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_against_a_plain_loop(policy: str, weight: float) -> None:
    """The published form: an optimizer for the features and one for the heads, every forward done anew."""
    options: dict[str, Any] = {"bottleneck_features": 0, "backbone_learning_rate_factor": 0.5, "weight_decay": 0.01}
    module = MCD(
        3,
        backbone="resnet8",
        batch_norm=policy,
        trade_off=0.7,
        generator_steps=3,
        class_balance=weight,
        classifier_features=8,
        classifier_dropout=0.0,
        classifier_normalization="batch",
        learning_rate=0.1,
        **options,
    )
    points(module)
    # batch norm in what makes the features too, so that it matters which images share a forward
    module.bottleneck = nn.Sequential(nn.BatchNorm1d(64), nn.ReLU())
    reference = copy.deepcopy(module)
    batches = [batch() for _ in range(3)]
    fit(module, batches)

    generator = nn.Sequential(reference.backbone, reference.bottleneck)
    heads = [reference.head, reference.second_head]
    settings: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    groups = [{"params": reference.backbone.parameters(), "lr": 0.05}, {"params": reference.bottleneck.parameters()}]
    optimizer_g = torch.optim.SGD(groups, lr=0.1, weight_decay=0.01)  # without momentum, as published
    optimizer_f = torch.optim.SGD([p for head in heads for p in head.parameters()], lr=0.1, **settings)

    def probabilities(images: DomainBatch) -> tuple[list[Tensor], list[Tensor]]:
        if policy == "joint":
            features = generator(torch.cat([images.source.images, images.target]))
            count = len(images.source.images)
            logits = [head(features) for head in heads]
            return [each[:count] for each in logits], [each[count:].softmax(1) for each in logits]
        source, target = generator(images.source.images), generator(images.target)
        return [head(source) for head in heads], [head(target).softmax(1) for head in heads]

    def balance(target: list[Tensor]) -> Tensor:
        return weight * sum((-p.mean(0).log().mean() for p in target), torch.zeros(()))

    for images in batches:
        for step in ("A", "B", "C", "C", "C"):
            source, target = probabilities(images)
            classification = sum(F.cross_entropy(logits, images.source.labels) for logits in source)
            discrepancy = 0.7 * (target[0] - target[1]).abs().mean()
            loss = {
                "A": classification + balance(target),
                "B": classification + balance(target) - discrepancy,
                "C": discrepancy,
            }[step]
            optimizer_g.zero_grad()
            optimizer_f.zero_grad()
            loss.backward()
            if step != "B":
                optimizer_g.step()
            if step != "C":
                optimizer_f.step()
    for (name, mine), theirs in zip(module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_clock_counts_batches(domains: Path) -> None:
    steps = Steps()
    module = contract.fit(
        MCD,
        domains,
        max_epochs=-1,
        max_steps=7,
        limit_val_batches=0,
        callbacks=[steps],
        model={"generator_steps": 2, "schedule_options": {"gamma": 1.0, "beta": 1.0}},
    )
    trainer = module.trainer
    assert trainer.global_step == 7
    assert trainer.fit_loop.epoch_loop.batch_progress.total.processed == 7
    assert batches_planned(trainer) == 7
    # four steps a batch, and one tick of the schedule
    assert steps.rates == pytest.approx([0.05 / (1 + index) for index in range(7) for _ in range(4)])


def test_bf16_uses_the_weights_of_the_last_step() -> None:
    """Autocast as torch has it keeps a weight's half-precision copy for a whole training step: B would run on A's
    weights. Lightning turns that off."""
    module = points(MCD(3, backbone="resnet8", bottleneck_features=0, classifier_features=8, learning_rate=0.5))
    stale: list[float] = []

    def compare(layer: nn.Linear, inputs: tuple[Tensor], outputs: Tensor) -> None:
        if layer.training:
            with torch.no_grad():
                fresh = F.linear(inputs[0].bfloat16(), layer.weight.bfloat16().clone(), layer.bias.bfloat16())
            stale.append(float((outputs - fresh).detach().abs().max()))

    assert isinstance(module.second_head, MLPHead)
    for layer in (module.backbone, module.second_head[-1]):
        layer.register_forward_hook(compare)  # type: ignore[arg-type]
    fit(module, [batch() for _ in range(2)], precision="bf16-mixed")
    assert len(stale) == 2 * (5 + 6)
    assert max(stale) == 0.0


def test_the_first_head_is_the_one_that_predicts() -> None:
    """TLlib reports the better of the two, by the labels of the test set."""
    module = contract.build_model(MCD).eval()
    images = torch.randn(5, 3, 16, 16)
    before = module(images)
    for parameter in module.second_head.parameters():  # type: ignore[union-attr]
        parameter.data.zero_()
    assert torch.equal(module(images), before)
    features = module.bottleneck(module.backbone(images))
    assert torch.equal(before, module.head(features))


def test_the_heads_do_not_start_alike() -> None:
    module = contract.build_model(MCD)
    pairs = zip(module.head.parameters(), module.second_head.parameters(), strict=True)  # type: ignore[union-attr]
    assert not any(torch.equal(first, second) for first, second in pairs)


def test_linear_heads() -> None:
    module = MCD(3, backbone="resnet8", classifier_features=0)
    assert isinstance(module.head, MLPHead)
    assert len(module.head) == 1


def toy(method: type[MCD], adapt: bool, seed: int, trade_off: float = 1.0, angle: float = 70.0) -> float:
    """Target accuracy where the two clusters of the source are turned in the target."""
    generator = torch.Generator().manual_seed(seed)

    def sample(count: int, degrees: float) -> tuple[Tensor, Tensor]:
        labels = torch.randint(2, (count,), generator=generator)
        turn = torch.tensor(degrees).deg2rad()
        centre = 1.5 * torch.stack([turn.cos(), turn.sin()])
        return (2.0 * labels - 1)[:, None] * centre + 0.4 * torch.randn(count, 2, generator=generator), labels

    batches = []
    for _ in range(300):
        source, labels = sample(64, 0.0)
        batches.append(DomainBatch(LabelledBatch(source, labels), sample(64, angle)[0]))
    torch.manual_seed(seed)
    module = method(
        2,
        backbone="resnet8",
        bottleneck_features=0,
        classifier_features=16,
        classifier_layers=1,
        classifier_dropout=0.0,
        classifier_normalization="none",
        learning_rate=0.1,
        backbone_learning_rate_factor=1.0,
        trade_off=trade_off if adapt else 0.0,
    )
    fit(points(module), batches, enable_model_summary=False)
    values, labels = sample(1000, angle)
    return float((module.eval()(values).argmax(1) == labels).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("method", [MCD, SWD])
def test_it_helps_on_a_toy(method: type[MCD]) -> None:
    assert toy(method, False, seed=1) < 0.96
    assert toy(method, True, seed=1) > 0.985


def test_the_heads_part_and_the_features_bring_them_together() -> None:
    """B raises the discrepancy, the first C lowers it."""
    module = points(MCD(3, backbone="resnet8", bottleneck_features=0, classifier_features=8, classifier_dropout=0.0))
    seen: list[float] = []
    measure = module.discrepancy

    def discrepancy(first: Tensor, second: Tensor) -> Tensor:
        value = measure(first, second)
        seen.append(float(value.detach()))
        return value

    module.discrepancy = discrepancy  # type: ignore[method-assign]
    fit(module, [batch(30, 30)])
    in_b, after_b, *later = seen
    assert after_b > in_b
    assert later == sorted(later, reverse=True)
    assert later[0] < after_b


def test_complaint() -> None:
    module = MCD(3, backbone="resnet8", classifier_features=8)
    found = dict(module.complaints({"train/head_agreement": 0.25}, 0.6))
    assert "25%" in found["heads"]
    assert "--model.generator_steps" in found["heads"]
    assert not dict(module.complaints({"train/head_agreement": 0.25}, 0.1))
    assert not dict(module.complaints({"train/head_agreement": 0.9}, 0.6))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("generator_steps", 0),
        ("class_balance", -0.1),
        ("classifier_features", -1),
        ("classifier_layers", -1),
        ("classifier_dropout", 1.0),
        ("classifier_normalization", "layer"),
    ],
)
def test_bad_values_name_the_flag(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"--model\.{option}"):
        MCD(3, backbone="resnet8", **{option: value})


def test_a_plain_ddp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DomainAdaptation, "prepare_data", lambda self: None)
    module = MCD(3, backbone="resnet8", classifier_features=8)
    module._trainer = SimpleNamespace(strategy=DDPStrategy())  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match=r"`--trainer\.strategy` to be ddp_find_unused_parameters_true"):
        module.prepare_data()
    module._trainer = SimpleNamespace(strategy=DDPStrategy(find_unused_parameters=True))  # type: ignore[assignment]
    module.prepare_data()
