"""Smooth domain-adversarial training: where a step looks, what it takes from there, and that it comes back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import contract
import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.func import functional_call

from framework.errors import ConfigurationError
from framework.functional import class_confusion
from framework.modules import SDAT, AlignmentSum
from framework.modules.adaptation.alignment_sum import alignment_terms
from framework.modules.adaptation.dann import AdversarialLoss

ONE_STEP: dict[str, Any] = {"max_steps": 1, "max_epochs": -1}
PLAIN: dict[str, Any] = {
    "bottleneck_dropout": 0.0,
    "schedule": "constant",
    "optimizer_options": {"momentum": 0.0, "nesterov": False},
    "weight_decay": 0.0,
}
# a batch norm of its own would make the discriminator's loss depend on what it has seen
CDAN_OPTIONS = {"normalization": "none", "hidden_features": 8, "reversal_schedule": "constant"}


class Watch(L.Callback):
    """The first batch, the weights at its start, and the means of what it logged."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.start: dict[str, Tensor] = {}
        self.after_backward: dict[str, Tensor] = {}
        self.means: dict[str, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.batch is None:
            self.batch, self.start = batch, contract.weights(pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.after_backward = contract.weights(pl_module)
        self.means = pl_module._means.means()


def fit(root: Path, method: Any = SDAT, model: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Watch]:
    watch = Watch()
    arguments: dict[str, Any] = {**ONE_STEP, "callbacks": [watch], **options}
    return contract.fit(method, root, model={**PLAIN, **(model or {})}, **arguments), watch


def by_definition(module: Any, watch: Watch, joint: bool, weights: dict[str, float]) -> dict[str, Tensor]:
    """The weights after one step of plain gradient descent, by ``functional_call``: nothing is moved in place."""
    start = {name: watch.start[name].clone().requires_grad_() for name, _ in module.named_parameters()}
    source, target, labels = watch.batch.source.images, watch.batch.target, watch.batch.source.labels

    def outputs(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        buffers = {name: value.clone() for name, value in watch.start.items() if name not in parameters}

        def part(name: str, inputs: Tensor) -> Tensor:
            prefix = f"{name}."
            own = {
                key.removeprefix(prefix): v for key, v in {**buffers, **parameters}.items() if key.startswith(prefix)
            }
            return functional_call(getattr(module, name), own, (inputs,))

        if joint:
            features = part("bottleneck", part("backbone", torch.cat([source, target])))
        else:
            features = torch.cat([part("bottleneck", part("backbone", images)) for images in (source, target)])
        logits = part("head", features)
        return *features.split(len(source)), *logits.split(len(source))

    def task_loss(parameters: dict[str, Tensor]) -> Tensor:
        _, _, logits, target_logits = outputs(parameters)
        confusion = class_confusion(target_logits, 2.5)
        mcc = (confusion.sum() - confusion.diagonal().sum()) / len(confusion)
        return F.cross_entropy(logits, labels) + weights.get("mcc", 0.0) * mcc

    moved = [name for name in start if not name.startswith("alignment")]
    gradients = torch.autograd.grad(task_loss(start), [start[name] for name in moved])
    length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    ascent = {name: 0.3 * gradient / length for name, gradient in zip(moved, gradients, strict=True)}
    there = {name: (value + ascent[name] if name in ascent else value).detach() for name, value in start.items()}
    there = {name: value.requires_grad_() for name, value in there.items()}

    def adversarial_loss(parameters: dict[str, Tensor]) -> Tensor:
        own, others, logits, target_logits = outputs(parameters)
        features, probabilities = torch.cat([own, others]), torch.cat([logits, target_logits]).softmax(1).detach()
        product = (features[:, :, None] * probabilities[:, None, :]).flatten(1)
        prefix = "alignment.losses.cdan.discriminator."
        network = {key.removeprefix(prefix): value for key, value in parameters.items() if key.startswith(prefix)}
        guess = functional_call(module.alignment.losses["cdan"].discriminator, network, (product,)).reshape(-1)
        return (F.softplus(-guess[: len(own)]).mean() + F.softplus(guess[len(own) :]).mean()) / 2

    down = torch.autograd.grad(task_loss(there), list(there.values()), allow_unused=True)
    adversarial = torch.autograd.grad(adversarial_loss(there), list(there.values()), allow_unused=True)
    after = {}
    for name, first, second in zip(there, down, adversarial, strict=True):
        first, second = (torch.zeros(()) if each is None else each for each in (first, second))
        reversed_sign = 1.0 if name.startswith("alignment") else -1.0
        after[name] = (start[name] - 0.05 * (first + reversed_sign * weights["cdan"] * second)).detach()
    return after


@pytest.mark.parametrize("policy", ["joint", "separate"])
@pytest.mark.parametrize("weights", [{"cdan": 0.7}, {"cdan": 0.7, "mcc": 1.5}], ids=["cdan", "cdan + mcc"])
def test_a_step_by_definition_in_float64(policy: str, weights: dict[str, float], domains: Path) -> None:
    model = {
        "radius": 0.3,
        "terms": weights,
        "term_options": {"cdan": CDAN_OPTIONS},
        "batch_norm": policy,
        "trade_off": 1.6,
    }
    module, watch = fit(domains, model=model, precision="64-true")
    expected = by_definition(module, watch, policy == "joint", {name: 1.6 * weight for name, weight in weights.items()})
    found = dict(module.named_parameters())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert not torch.equal(found[name], watch.start[name]), name
        torch.testing.assert_close(
            found[name].detach(), value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def climbed_with(terms: dict[str, float], domains: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Where the first step looks."""
    found: list[Tensor] = []
    climb = SDAT._climb

    def watched(module: SDAT, loss: Tensor) -> None:
        climb(module, loss)
        found.append(torch.cat([parameter.detach().flatten() for parameter in module._network().parameters()]))

    with monkeypatch.context() as patch:
        patch.setattr(SDAT, "_climb", watched)
        fit(domains, model={"radius": 0.5, "terms": terms})
    return found[0]


TASKS = {"mcc", "bnm", "information_maximization", "rotation", "jigsaw", "masking"}


def test_tasks_alone_say_where_a_step_looks(domains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = {name: cls for name, cls in alignment_terms().items() if cls.__module__.startswith("framework.")}
    assert {name for name, cls in terms.items() if cls.is_task} == TASKS
    alone = climbed_with({"cdan": 1.0}, domains, monkeypatch)
    for name in ("mdd", "dan", "adda"):
        assert torch.equal(climbed_with({name: 2.0}, domains, monkeypatch), alone), name
    for name in ("mcc", "rotation"):
        assert not torch.equal(climbed_with({name: 2.0}, domains, monkeypatch), alone), name


def test_radius_0_is_the_sum(domains: Path) -> None:
    terms = {"terms": {"cdan": 1.0, "mcc": 1.0}}
    smooth = contract.fit(SDAT, domains, model={"radius": 0.0, **terms}, max_epochs=1)
    assert contract.equal(
        contract.weights(smooth), contract.weights(contract.fit(AlignmentSum, domains, model=terms, max_epochs=1))
    )
    other = contract.fit(SDAT, domains, model={"radius": 0.1, **terms}, max_epochs=1)
    assert not contract.equal(contract.weights(smooth), contract.weights(other))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_comes_back_and_running_statistics_are_those_of_its_weights(precision: Any, domains: Path) -> None:
    options: dict[str, Any] = {"terms": {"cdan": 1.0, "mcc": 1.0}}
    smooth, watch = fit(domains, model={"radius": 0.5, **options}, precision=precision)
    _, plain = fit(domains, AlignmentSum, model=options, precision=precision)
    for name, _ in smooth.named_parameters():  # before the optimizer's step, bit for bit
        assert torch.equal(watch.after_backward[name], watch.start[name]), name
    statistics = [name for name in watch.start if "running" in name or "num_batches" in name]
    own = [name for name in statistics if not name.startswith("alignment")]
    assert own
    for name in own:
        assert torch.equal(watch.after_backward[name], plain.after_backward[name]), name
    assert any(name.startswith("alignment") for name in statistics)
    for name in set(statistics) - set(own):  # the discriminator has its one pass
        assert not torch.equal(watch.after_backward[name], watch.start[name]), name


class CachingAutocast(MixedPrecision):
    """As autocast is by default, and Lightning's is not: it keeps copies of the weights."""

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "trainer",
    [{}, {"precision": "bf16-mixed"}, {"plugins": [CachingAutocast("bf16-mixed", "cpu")]}],
    ids=["float32", "bf16", "autocast with a cache"],
)
def test_the_loss_is_higher_where_it_looks(trainer: dict[str, Any], domains: Path) -> None:
    _, watch = fit(domains, model={"radius": 0.5}, **trainer)
    before, there = watch.means["train/classification_loss_before"], watch.means["train/classification_loss"]
    assert there > before + 0.2


def test_both_passes_draw_the_same_dropout(domains: Path) -> None:
    _, watch = fit(domains, model={"radius": 1e-9, "bottleneck_dropout": 0.5})
    before, there = watch.means["train/classification_loss_before"], watch.means["train/classification_loss"]
    assert there == pytest.approx(before, abs=1e-5)


def test_loss_scale_plays_no_part(domains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-mixed has one, without which small gradients would be lost in float16."""
    climbed: list[list[Tensor]] = []
    scalers = [None, torch.amp.GradScaler("cpu", init_scale=2.0**16)]
    climb = SDAT._climb

    def watched(module: SDAT, loss: Tensor) -> None:
        module.trainer.precision_plugin.scaler = scalers[len(climbed)]  # type: ignore[attr-defined]
        climb(module, loss)
        module.trainer.precision_plugin.scaler = None  # type: ignore[attr-defined]
        climbed.append([parameter.detach().clone() for parameter in module._network().parameters()])

    monkeypatch.setattr(SDAT, "_climb", watched)
    for _ in scalers:
        fit(domains, model={"radius": 0.5})
    for first, second in zip(*climbed, strict=True):
        torch.testing.assert_close(first, second)


class InterruptedStepError(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interrupted_step_leaves_the_weights_as_they_were(
    where: str, domains: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise InterruptedStepError

    L.seed_everything(0, verbose=False)
    start = dict(contract.build_model(SDAT, **PLAIN).named_parameters())
    if where == "forward":
        monkeypatch.setattr(AdversarialLoss, "domain_loss", interrupted)
    else:
        monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    found: list[Any] = []

    class Keep(L.Callback):
        def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
            found.append(pl_module)

    with pytest.raises(InterruptedStepError):
        fit(domains, model={"radius": 0.5}, callbacks=[Keep()])
    for name, parameter in found[0].named_parameters():
        assert torch.equal(parameter, start[name]), name


def test_a_frozen_backbone_stays(domains: Path) -> None:
    class Frozen(SDAT):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.backbone.requires_grad_(False)

    module, watch = fit(domains, Frozen, model={"radius": 0.5})
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, watch.start[name]) == name.startswith("backbone"), name


def test_mistakes() -> None:
    with pytest.raises(ConfigurationError, match=r"`--model\.radius` to be 0 or more.* -0\.1"):
        SDAT(3, backbone="resnet8", radius=-0.1)
    with pytest.raises(ConfigurationError, match=r"`--model\.terms` .*'mdc'"):
        SDAT(3, backbone="resnet8", terms={"mdc": 1.0})


def test_a_radius_that_is_too_large_is_named() -> None:
    module = SDAT(3, backbone="resnet8", radius=2.0)
    means = {"train/classification_loss": 1.9, "train/classification_loss_before": 0.4}
    found = dict(module.complaints(means, 0.2))
    assert "`--model.radius` 2.0 add 1.5 nats" in found["radius"]
    assert "radius" not in dict(module.complaints(means | {"train/classification_loss": 1.2}, 0.2))
    assert "radius" not in dict(module.complaints(means, 0.05))
