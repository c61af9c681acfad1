"""ADDA: the inverted-label loss against independent computations, and the two stages of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from contract import build_data, build_model, equal, fit, toy_accuracy, weights

from framework.errors import ConfigurationError
from framework.modules import ADDA, SourceOnly
from framework.modules.adaptation.adda import AdversarialInvertedLabelLoss
from framework.networks import NetworkOutputs
from framework.trainer import Trainer

SWITCH = 8  # of the 15 batches of a run of the contract: the first number of batches that is half of them
PARTS = ("backbone.", "bottleneck.", "head.")


def outputs(count: int, shift: float = 0.0) -> NetworkOutputs:
    features = (torch.randn(count, 6, dtype=torch.float64) + shift).requires_grad_()
    return NetworkOutputs(features, torch.zeros(count, 3, dtype=torch.float64))


def loss(**options: Any) -> AdversarialInvertedLabelLoss:
    return AdversarialInvertedLabelLoss(6, **{"hidden_features": 8, **options}).double()


# ---------------------------------------------------------------------- the loss
@pytest.mark.parametrize("label", [1, 0])
@pytest.mark.parametrize(("weighting", "factor"), [("sum", 1.0), ("mean", 0.5)])
def test_value_against_a_loop(weighting: Any, factor: float, label: Any) -> None:
    alignment, source, target = loss(domain_weighting=weighting, source_label=label), outputs(5), outputs(9, 1.0)
    losses: dict[str, list[float]] = {"source": [], "target": [], "inverted": []}
    for name, domain in (("source", source), ("target", target)):
        for row in domain.features:
            says_source = 1 / (1 + math.exp(-alignment.discriminator(row[None]).item() * (1 if label else -1)))
            losses[name].append(-math.log(says_source if name == "source" else 1 - says_source))
            if name == "target":
                losses["inverted"].append(-math.log(says_source))
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    expected = factor * (means["source"] + means["target"]) + means["inverted"]
    assert alignment(source, target, torch.tensor(0.5)).item() == pytest.approx(expected)
    assert float(alignment.diagnostics["domain_loss"]) == pytest.approx((means["source"] + means["target"]) / 2)
    assert float(alignment.diagnostics["inverted_loss"]) == pytest.approx(means["inverted"])


@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_who_learns_what(normalization: Any) -> None:
    """The discriminator tells the domains apart, the target's features the inverted label, the source's nothing."""
    alignment, source, target = loss(normalization=normalization), outputs(5), outputs(9, 1.0)
    total = alignment(source, target, torch.tensor(0.5))
    parameters = list(alignment.parameters())
    found = torch.autograd.grad(total, [source.features, target.features, *parameters], allow_unused=True)
    assert found[0] is None
    logits = alignment.discriminator(torch.cat([source.features, target.features]))
    inverted = -torch.nn.functional.logsigmoid(logits[5:]).mean()
    torch.testing.assert_close(found[1], torch.autograd.grad(inverted, target.features, retain_graph=True)[0])
    honest = -torch.nn.functional.logsigmoid(logits[:5]).mean() - torch.nn.functional.logsigmoid(-logits[5:]).mean()
    for gradient, expected in zip(found[2:], torch.autograd.grad(honest, parameters), strict=True):
        torch.testing.assert_close(gradient, expected)
        assert gradient.abs().max() > 0 or normalization == "batch"  # a bias before batch norm has none


def test_the_gradient_does_not_vanish_where_the_discriminator_is_sure() -> None:
    """Why the labels are inverted: at a target image that is surely target, a reversed gradient is next to nothing."""
    alignment, source, target = loss(), outputs(5), outputs(5)
    with torch.no_grad():
        alignment.discriminator[-1].bias.fill_(-20.0)
    inverted = torch.autograd.grad(alignment(source, target, torch.tensor(1.0)), target.features)[0]
    honest = torch.nn.functional.softplus(alignment.discriminator(target.features)).mean()
    plain = torch.autograd.grad(honest, target.features)[0]
    assert inverted.abs().max() > 1e6 * plain.abs().max()


def test_order_of_images_does_not_matter() -> None:
    alignment, source, target = loss(), outputs(6), outputs(4, 1.0)
    mixed = NetworkOutputs(source.features[torch.randperm(6)], source.logits)
    progress = torch.tensor(0.5)
    torch.testing.assert_close(alignment(mixed, target, progress), alignment(source, target, progress))


def test_it_helps_on_a_toy() -> None:
    torch.manual_seed(0)
    alignment = AdversarialInvertedLabelLoss(16, hidden_features=64)
    assert toy_accuracy(None, "rotation", seed=1, steps=200) < 0.93
    assert toy_accuracy(alignment, "rotation", seed=1, trade_off=0.5, steps=200) > 0.97


# ---------------------------------------------------------------------- the two stages
def state_at(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def test_the_first_stage_is_source_only(domains: Path, tmp_path: Path) -> None:
    for method in (ADDA, SourceOnly):
        fit(method, domains, save=(SWITCH, tmp_path / f"{method.__name__}.ckpt"))
    adda, source_only = state_at(tmp_path / "ADDA.ckpt"), state_at(tmp_path / "SourceOnly.ckpt")
    for prefix in PARTS:
        assert equal(part(adda, prefix), part(source_only, prefix)), prefix


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "AdamW", "optimizer_options": None, "weight_decay": 0.3, "learning_rate": 0.001},
        {"weight_decay": 0.3, "optimizer_options": {"momentum": 0.9}},
    ],
    ids=["SGD", "AdamW", "strong decay"],
)
def test_after_the_switch_head_and_source_encoder_stand_still(
    options: dict[str, Any], domains: Path, tmp_path: Path
) -> None:
    module = fit(ADDA, domains, save=(SWITCH, tmp_path / "switch.ckpt"), model=options)
    before, after = state_at(tmp_path / "switch.ckpt"), weights(module)
    assert equal(part(before, "head."), part(after, "head."))
    for name in ("backbone.", "bottleneck."):
        assert equal(part(before, name), part(after, f"source_{name}")), name  # batch-norm statistics too
        assert not equal(part(before, name), part(after, name)), name
    assert not any(part.training for part in module.source_backbone.modules())
    assert not any(parameter.requires_grad for parameter in module.source_backbone.parameters())
    assert not equal(part(before, "alignment."), part(after, "alignment."))
    state = module.trainer.optimizers[0].state  # begun anew at the switch
    assert not any(parameter in state for parameter in module.head.parameters())
    if "optimizer" in options:
        assert {int(state[parameter]["step"]) for parameter in module.backbone.parameters()} == {15 - SWITCH}


def test_the_first_stage_leaves_the_discriminator_alone(domains: Path, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    start = weights(build_model(ADDA))
    fit(ADDA, domains, save=(SWITCH, tmp_path / "switch.ckpt"))
    assert equal(part(start, "alignment."), part(state_at(tmp_path / "switch.ckpt"), "alignment."))


@pytest.mark.parametrize("batches", [SWITCH - 1, SWITCH, SWITCH + 1, 12])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_resume_around_the_switch(batches: int, optimizer: str, domains: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "learning_rate": 0.01}
    whole = fit(ADDA, domains, save=(batches, tmp_path / "stop.ckpt"), model=options)
    assert bool(state_at(tmp_path / "stop.ckpt")["_extra_state"]) is (batches > SWITCH)
    assert equal(weights(whole), weights(fit(ADDA, domains, resume=tmp_path / "stop.ckpt", model=options)))


@pytest.mark.parametrize("schedule", ["constant", "inverse_decay", "cosine"])
@pytest.mark.parametrize("batches", [SWITCH, 12])
def test_the_second_stage_has_its_own_learning_rate(schedule: str, batches: int, domains: Path, tmp_path: Path) -> None:
    rates: dict[bool, list[list[float]]] = {True: [], False: []}

    class Rates(L.Callback):
        def __init__(self, factored: bool) -> None:
            self.factored = factored

        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            rates[self.factored].append([group["lr"] for group in optimizer.param_groups])

    path = tmp_path / "stop.ckpt"
    model: dict[str, Any] = {"schedule": schedule, "adaptation_learning_rate_factor": 0.25}
    whole = fit(ADDA, domains, save=(batches, path), model=model)
    fit(ADDA, domains, model=model, callbacks=[Rates(True)])
    fit(ADDA, domains, model=model | {"adaptation_learning_rate_factor": 1.0}, callbacks=[Rates(False)])
    assert len(rates[True]) == 15
    for step, (found, plain) in enumerate(zip(rates[True], rates[False], strict=True)):
        assert found == pytest.approx([(0.25 if step >= SWITCH else 1.0) * rate for rate in plain]), step
    assert equal(weights(whole), weights(fit(ADDA, domains, resume=path, model=model)))


def test_a_longer_plan_does_not_bring_the_first_stage_back(domains: Path, tmp_path: Path) -> None:
    fit(ADDA, domains, save=(10, tmp_path / "stop.ckpt"))
    module = fit(ADDA, domains, resume=tmp_path / "stop.ckpt", max_epochs=6)
    assert equal(part(state_at(tmp_path / "stop.ckpt"), "head."), part(weights(module), "head."))


def test_another_fit_begins_with_the_first_stage(domains: Path) -> None:
    module = fit(ADDA, domains)
    assert module.adapting
    head = weights(module.head)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    Trainer(max_steps=2, enable_progress_bar=False, limit_val_batches=0, **options).fit(module, build_data(domains))
    assert not equal(head, weights(module.head))


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_switch_within_accumulated_batches(share: float, domains: Path, tmp_path: Path) -> None:
    """No gradient of the first stage moves the head in the second."""
    options: dict[str, Any] = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.1,
        "max_epochs": 2,
        "data": {"steps_per_epoch": 5},
        "model": {"pretraining_share": share},
    }
    switch = round(10 * share)  # after 3: in the middle of two; after 5: with the epoch
    module = fit(ADDA, domains, save=(switch, tmp_path / "switch.ckpt"), **options)
    before = state_at(tmp_path / "switch.ckpt")
    assert equal(part(before, "head."), part(weights(module), "head."))
    assert equal(part(before, "backbone."), part(weights(module), "source_backbone."))
    assert not equal(part(before, "backbone."), part(weights(module), "backbone."))


def test_each_domain_has_its_encoder_in_the_second_stage() -> None:
    module = ADDA(3, backbone="resnet8", bottleneck_features=8).train()
    seen: list[tuple[str, int]] = []
    for name in ("backbone", "source_backbone"):
        getattr(module, name).register_forward_hook(lambda _, x, __, name=name: seen.append((name, len(x[0]))))
    images = torch.randn(4, 3, 16, 16)
    for adapting in (False, True):
        module.adapting = adapting
        module.outputs_in("source", images)
        module.outputs_in("target", images[:3])
    assert seen == [("backbone", 4), ("backbone", 3), ("source_backbone", 4), ("backbone", 3)]


def test_the_source_is_validated_by_its_own_encoder(domains: Path) -> None:
    module = fit(ADDA, domains, model={"learning_rate": 0.1}).eval()
    images = torch.randn(6, 3, 16, 16)
    source, target = module.outputs_in("source", images), module.outputs_in("target", images)
    expected = module.head(module.source_bottleneck(module.source_backbone(images)))
    assert torch.equal(source.logits, expected)
    assert torch.equal(module(images), target.logits)
    assert not torch.allclose(source.logits, target.logits, atol=1e-3)


def test_the_stage_survives_load_from_checkpoint(domains: Path, tmp_path: Path) -> None:
    module = fit(ADDA, domains, save=(15, tmp_path / "last.ckpt"))
    loaded = ADDA.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True, map_location="cpu")
    assert loaded.adapting is module.adapting is True
    assert loaded.train().source_backbone.training is False
    assert ADDA(3, backbone="resnet8").train().source_backbone.training  # not in use: Lightning warns of eval mode


# ---------------------------------------------------------------------- options and complaints
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pretraining_share", 0.0),
        ("pretraining_share", 1.0),
        ("pretraining_share", -0.5),
        ("adaptation_learning_rate_factor", 0.0),
        ("discriminator_features", 0),
        ("discriminator_normalization", "layer"),
        ("domain_weighting", "half"),
        ("source_label", 2),
        ("batch_norm", "separate"),
        ("batch_norm", "domain_specific"),
    ],
)
def test_bad_values_name_the_flag(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"--model\.{option}"):
        ADDA(3, backbone="resnet8", **{option: value})


def test_complaints_count_progress_within_the_stage() -> None:
    module = ADDA(3, backbone="resnet8", pretraining_share=0.5)
    means = {"train/domain_accuracy": 0.995}
    module.adapting = True
    assert not list(module.complaints(means, 0.55))  # a discriminator that wins at first is as it should be
    ((key, sentence),) = module.complaints(means, 0.7)
    assert key == "saturated"
    for words in (
        "99.5%",
        "`--model.adaptation_learning_rate_factor`",
        "`--model.discriminator_normalization dropout`",
        "`--model.discriminator_features`",
    ):
        assert words in sentence
    assert not list(module.complaints({"train/domain_accuracy": 0.9}, 0.9))
    module.adapting = False
    (found,) = module.complaints({"train/classification_loss": 1.2}, 0.2)  # 0.4 of the first stage
    assert found[0] == "source"
