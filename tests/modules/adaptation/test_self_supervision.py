"""Pretext tasks as terms: whose images they take, which way through the backbone, and what they leave alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import contract
import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.functional import quarter_turns
from framework.modules import AlignmentSum
from framework.modules.adaptation import JigsawLoss, RotationLoss
from framework.modules.adaptation.self_supervision import SelfSupervisedLoss
from framework.modules.pretraining import PretextTask
from framework.modules.pretraining.base import Encoder
from framework.networks import DomainSpecificBatchNorm, NetworkOutputs, create_backbone, select_domain
from framework.networks.batch_norm import batch_norms
from framework.trainer import Trainer

PROGRESS = torch.tensor(0.5)
POLICIES = ["joint", "separate", "domain_specific"]


def outputs(images: Tensor | None) -> NetworkOutputs:
    count = 4 if images is None else len(images)
    return NetworkOutputs(torch.randn(count, 16), torch.randn(count, 3), images=images)


def summed(policy: str = "joint", domains: str = "both", **options: Any) -> AlignmentSum:
    """A sum whose one term is the rotation in all four turns."""
    term_options = {"rotation": {"rotations": "all", "domains": domains}}
    options = {"terms": {"rotation": 1.0}, "term_options": term_options, "batch_norm": policy, **options}
    return AlignmentSum(3, backbone="resnet8", bottleneck_features=16, **options)


def images_of_both() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 16, 16), 2 * torch.randn(8, 3, 16, 16) + 1


class Passes:
    """What goes through a backbone: images, and the domain whose batch norm they meet."""

    def __init__(self, backbone: nn.Module) -> None:
        self.images: list[Tensor] = []
        self.domains: list[str] = []
        backbone.register_forward_pre_hook(self.record)

    def record(self, backbone: nn.Module, inputs: tuple[Tensor]) -> None:
        self.images.append(inputs[0])
        norms = [layer for layer in backbone.modules() if isinstance(layer, DomainSpecificBatchNorm)]
        self.domains.append("/".join(sorted({norm.domain for norm in norms})))


def turned(images: Tensor) -> Tensor:
    return quarter_turns(images).flatten(0, 1)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in module.state_dict().items()
        if "running" in name or name.endswith("num_batches_tracked")
    }


# ---------------------------------------------------------------------- passes
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("domains", ["both", "target"])
def test_each_domains_images_pass_as_the_batch_norm_policy_has_it(policy: str, domains: str) -> None:
    module = summed(policy, domains)
    passes = Passes(module.backbone)
    source, target = images_of_both()
    module.alignment(outputs(source), outputs(target), PROGRESS)
    parts = [source, target] if domains == "both" else [target]
    expected = [turned(torch.cat(parts))] if policy == "joint" else [turned(part) for part in parts]
    assert len(passes.images) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(passes.images, expected, strict=True))
    names = ["source", "target"] if domains == "both" else ["target"]
    assert passes.domains == (names if policy == "domain_specific" else [""] * len(expected))
    norms = [layer for layer in module.modules() if isinstance(layer, DomainSpecificBatchNorm)]
    assert {norm.domain for norm in norms} <= {"target"}  # what inference uses


@pytest.mark.parametrize("policy", POLICIES)
def test_value_against_passes_of_a_copy(policy: str) -> None:
    """The mean over all images, though a domain has more of them than the other."""
    module = summed(policy)
    source, target = images_of_both()
    head, backbone = module.alignment.losses["rotation"].task.head, copy.deepcopy(module.backbone)  # type: ignore[union-attr, index, operator]

    def total(domain: str, images: Tensor) -> Tensor:
        select_domain(backbone, domain)  # type: ignore[arg-type]
        labels = torch.arange(4).repeat_interleave(len(images))
        return F.cross_entropy(head(backbone(turned(images))), labels, reduction="sum")  # type: ignore[operator]

    if policy == "joint":
        expected = total("target", torch.cat([source, target])) / 48
    else:
        expected = (total("source", source) + total("target", target)) / 48
    torch.testing.assert_close(module.alignment(outputs(source), outputs(target), PROGRESS), expected)


def test_diagnostics_are_means_over_all_images_too() -> None:
    class Size(PretextTask):
        def forward(self, encode: Encoder, images: Tensor) -> Tensor:
            self.diagnostics = {"size": torch.tensor(float(len(images)))}
            return encode(images).sum() * 0 + len(images)

    loss = SelfSupervisedLoss(Size(), lambda images: [(torch.flatten, part) for part in images])
    source, target = images_of_both()
    value = loss(outputs(source), outputs(target), PROGRESS)
    assert float(value) == pytest.approx((4 * 4 + 8 * 8) / 12)
    assert float(loss.diagnostics["size"]) == pytest.approx((4 * 4 + 8 * 8) / 12)


# ---------------------------------------------------------------------- batch statistics
@pytest.mark.parametrize("policy", POLICIES)
def test_running_statistics_are_of_the_classifiers_images_alone(policy: str) -> None:
    module = summed(policy)
    source, target = images_of_both()
    start = statistics(module)
    module.alignment(outputs(source), outputs(target), PROGRESS).backward()
    after = statistics(module)
    assert all(torch.equal(value, start[name]) for name, value in after.items())
    module.domain_outputs(source, target)
    after = statistics(module)
    assert not any(torch.equal(value, start[name]) for name, value in after.items() if name.startswith("backbone."))
    assert all(layer.track_running_stats for layer in batch_norms(module))


def test_a_run_leaves_the_statistics_of_the_run_without_the_term(domains: Path) -> None:
    """With the weights held still, so that the images are the only difference."""
    still: dict[str, Any] = {"learning_rate": 0.0, "batch_norm": "separate", "bottleneck_dropout": 0.0}
    with_term = contract.fit(AlignmentSum, domains, model={"terms": {"rotation": 1.0}, **still}, max_epochs=1)
    without = contract.fit(AlignmentSum, domains, model={"terms": {"dan": 0.0}, **still}, max_epochs=1)
    found, expected = statistics(with_term), statistics(without)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


# ---------------------------------------------------------------------- gradients
@pytest.mark.parametrize("term", ["rotation", "jigsaw"])
def test_gradients_reach_the_backbone_and_the_tasks_head_alone(term: str) -> None:
    module = summed(terms={term: 1.0}, term_options={})
    source, target = images_of_both()
    module.alignment(outputs(source), outputs(target), PROGRESS).backward()
    for name, parameter in module.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (not name.startswith(("bottleneck.", "head."))), name


def test_the_targets_term_leaves_the_sources_batch_norm_alone() -> None:
    module = summed("domain_specific", "target")
    source, target = images_of_both()
    module.alignment(outputs(source), outputs(target), PROGRESS).backward()
    for name, parameter in module.backbone.named_parameters():
        assert (parameter.grad is None) == (".source." in name), name


def test_the_backbone_is_not_twice_in_the_state_dict() -> None:
    module = summed(terms={"rotation": 1.0, "jigsaw": 1.0}, term_options={})
    prefix = "alignment.losses."
    own = {name.removeprefix(prefix) for name in module.state_dict() if name.startswith(prefix)}
    heads = {f"{term}.task.head.{part}" for term in ("rotation", "jigsaw") for part in ("weight", "bias")}
    assert own == heads | {"jigsaw.task.permutations"}
    assert [group["name"] for group in module.parameter_groups()] == ["backbone", "bottleneck", "head", "alignment"]


@pytest.mark.parametrize("kind", [RotationLoss, JigsawLoss])
def test_a_copy_goes_through_the_copied_backbone(kind: type[SelfSupervisedLoss]) -> None:
    """As for a moving average of the weights, with and without Lightning."""
    source, target = images_of_both()
    module = summed(terms={kind.term: 1.0}, term_options={})
    twin = copy.deepcopy(module)
    twin.alignment(outputs(source), outputs(target), PROGRESS).backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    backbone = create_backbone("resnet8")
    both = nn.ModuleList([backbone, kind(backbone)])  # type: ignore[arg-type]
    copied = copy.deepcopy(both)
    copied[1](outputs(source), outputs(target), PROGRESS).backward()
    assert all(parameter.grad is None for parameter in both.parameters())
    assert all(parameter.grad is not None for parameter in copied.parameters())


# ---------------------------------------------------------------------- without Lightning
@pytest.mark.parametrize("kind", [RotationLoss, JigsawLoss])
def test_a_plain_loop_needs_the_backbone_alone(kind: type[SelfSupervisedLoss]) -> None:
    backbone = create_backbone("resnet8")
    passes, start = Passes(backbone), statistics(backbone)
    loss = kind(backbone)  # type: ignore[arg-type]
    source, target = images_of_both()
    loss(outputs(source), outputs(target), PROGRESS).backward()
    assert [len(images) for images in passes.images] == [12]  # one pass, one image for each
    assert all(p.grad is not None for p in [*backbone.parameters(), *loss.parameters()])
    assert all(torch.equal(value, start[name]) for name, value in statistics(backbone).items())
    assert loss.diagnostics.keys() == {f"{kind.term}_accuracy"}


def test_it_learns_on_both_domains() -> None:
    """Images are brighter at the top in both; the target's are darker and have more noise."""
    slope = torch.linspace(1, -1, 8)

    def batch() -> tuple[NetworkOutputs, NetworkOutputs]:
        source = slope.view(8, 1) + 0.3 * torch.randn(16, 3, 8, 8)
        target = slope.view(8, 1) - 0.5 + 0.5 * torch.randn(16, 3, 8, 8)
        return outputs(source), outputs(target)

    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16))
    backbone.num_features = 16  # type: ignore[assignment]
    loss = RotationLoss(backbone)
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss.parameters()], lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        loss(*batch(), PROGRESS).backward()
        optimizer.step()
    loss(*batch(), PROGRESS)
    assert float(loss.diagnostics["rotation_accuracy"]) > 0.9


# ---------------------------------------------------------------------- in a run
RUN: dict[str, Any] = {
    "terms": {"rotation": 1.0, "jigsaw": 0.5, "mcc": 1.0},
    "term_options": {"rotation": {"rotations": "all"}, "jigsaw": {"grid": 2, "permutations": 7}},
}


class FirstDiagnostics(L.Callback):
    """What the alignment has measured after the first batch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not hasattr(self, "found"):
            self.found = dict(pl_module.alignment.diagnostics)  # type: ignore[union-attr, arg-type]


def test_the_terms_images_are_those_of_the_batch(domains: Path) -> None:
    L.seed_everything(0, verbose=False)
    module = summed("domain_specific")
    passes = Passes(module.backbone)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(**quiet, max_steps=1, limit_val_batches=0).fit(module, contract.build_data(domains))
    source, target, *others = passes.images[-4:]  # before them, the size was tried
    assert passes.domains[-4:] == ["source", "target"] * 2
    assert torch.equal(others[0], turned(source))
    assert torch.equal(others[1], turned(target))
    assert not torch.equal(source, target)


@pytest.mark.parametrize("policy", POLICIES)
def test_terms_beside_another_one(policy: str, domains: Path) -> None:
    first = FirstDiagnostics()
    L.seed_everything(0, verbose=False)
    start = contract.weights(contract.build_model(AlignmentSum, batch_norm=policy, **RUN))
    model = {**RUN, "batch_norm": policy}
    module = contract.fit(AlignmentSum, domains, model=model, max_epochs=1, callbacks=[first])
    assert {"rotation", "rotation/rotation_accuracy", "jigsaw/jigsaw_accuracy", "mcc"} <= first.found.keys()
    assert not any(value.requires_grad for value in first.found.values())
    assert float(first.found["jigsaw"]) == pytest.approx(math.log(8), abs=0.8)
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, start[name]), f"{name} did not change"


def test_resumed_equals_uninterrupted_and_a_checkpoint_reloads(domains: Path, tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    whole = contract.fit(AlignmentSum, domains, model=RUN, save=(7, path))
    resumed = contract.fit(AlignmentSum, domains, model=RUN, resume=path)
    assert contract.equal(contract.weights(whole), contract.weights(resumed))
    loaded = L.LightningModule.load_from_checkpoint(path, weights_only=True, map_location="cpu")
    assert type(loaded) is AlignmentSum
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert contract.equal(contract.weights(loaded), saved)
    assert loaded.alignment.losses["rotation"].task.rotations == "all"  # type: ignore[index, union-attr]
    images = torch.randn(3, 3, 16, 16)
    assert torch.isfinite(loaded.alignment(outputs(images), outputs(images), PROGRESS))


def test_bf16_mixed(domains: Path) -> None:
    module = contract.fit(AlignmentSum, domains, model=RUN, precision="bf16-mixed", max_epochs=1)
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["joint", "domain_specific"])
def test_compiled_trains_alike(policy: str, domains: Path) -> None:
    """Backbone and sum compiled: the term's passes go through the compiled backbone, and change no number."""
    options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0}
    model = {**RUN, "batch_norm": policy}
    plain = contract.weights(contract.fit(AlignmentSum, domains, model=model, **options))
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    L.seed_everything(0, verbose=False)
    module = contract.build_model(AlignmentSum, compile=True, **model)
    module.backbone.compile(backend=backend, fullgraph=True)  # kept by the module, which would take the inductor
    module.alignment.compile(backend="eager")
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        Trainer(**quiet, **options).fit(module, contract.build_data(domains))
    finally:
        torch._dynamo.reset()
    assert len(graphs) >= 3  # of the classifier's pass, which moves running statistics, and of two terms' passes
    for name, value in contract.weights(module).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------------- mistakes
def test_outputs_without_images() -> None:
    loss = RotationLoss(create_backbone("resnet8"))
    images = torch.randn(4, 3, 16, 16)
    for source, target in ((None, images), (images, None)):
        with pytest.raises(ValueError, match="Expected source and target with their images, but got none"):
            loss(outputs(source), outputs(target), PROGRESS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": {"domains": "source"}}, "`domains` to be 'both' or 'target', but got 'source'"),
        (
            {"rotation": {"rotations": "some"}},
            r"`--model\.term_options\.rotation\.rotations` to be 'all' or 'random', but got 'some'",
        ),
        ({"rotation": {"backbone": "resnet8"}}, r"`--model\.term_options\.rotation` .*'backbone'"),
        ({"jigsaw": {"permutation": 3}}, r"`--model\.term_options\.jigsaw` .*Did you mean 'permutations'"),
        ({"jigsaw": {"grid": 1}}, r"`--model\.term_options\.jigsaw\.grid` to be between 2 and 10"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        summed(terms=dict.fromkeys(options, 1.0), term_options=options)
