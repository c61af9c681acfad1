"""Pretrained backbones on a new task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from framework import ImageFolderDataModule, ResidualClassifier, Trainer, TransferClassifier
from framework.errors import ConfigurationError
from framework.modules.transfer.unfreezing import may_skip_backward, unfrozen_stages
from framework.networks.batch_norm import batch_norms

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
}


@pytest.fixture
def data(images: Callable[..., Path], tmp_path: Path) -> ImageFolderDataModule:
    images(tmp_path / "data", ["a", "b"], count=8)  # six steps in two epochs
    return ImageFolderDataModule(
        str(tmp_path / "data"), batch_size=4, steps_per_epoch=3, image_size=16, crop="pad", num_workers=0
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A backbone with statistics of its own, as training leaves them."""
    torch.manual_seed(7)
    backbone = ResidualClassifier(2, backbone="resnet8").backbone
    for name, value in backbone.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_()
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def unchanged(before: dict[str, Tensor], module: torch.nn.Module) -> list[str]:
    return [name for name, value in module.state_dict().items() if torch.equal(value, before[name])]


class Modes(L.Callback):
    """Whether each part is in training mode, batch after batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.seen.append((any(part.training for part in module.backbone.modules()), module.head.training))


@pytest.mark.parametrize("interval", [1.0, 1])
def test_frozen_leaves_the_backbone_as_it_is(data: ImageFolderDataModule, weights: Path, interval: Any) -> None:
    model = TransferClassifier(
        2, backbone="resnet8", weights=str(weights), policy="frozen", bottleneck_features=8, learning_rate=0.1
    )
    before, modes = state(model), Modes()
    loaded = torch.load(weights, weights_only=True)
    assert all(torch.equal(before[f"backbone.{name}"], value) for name, value in loaded.items())
    trainer = Trainer(callbacks=modes, val_check_interval=interval, **QUIET)  # with validation between the batches
    trainer.fit(model, data)
    same = unchanged(before, model)
    assert [name for name in before if name.startswith("backbone.")] == [n for n in same if n.startswith("backbone.")]
    assert not [name for name in same if name.startswith(("head.", "bottleneck."))]
    assert modes.seen == [(False, True)] * 6
    groups = trainer.optimizers[0].param_groups
    assert [group["name"] for group in groups] == ["bottleneck", "head"]
    optimized = {id(p) for group in groups for p in group["params"]}
    assert optimized == {id(p) for part in (model.bottleneck, model.head) for p in part.parameters()}
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.parameters())


def test_frozen_stays_so_whatever_is_called(weights: Path) -> None:
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), policy="frozen")
    for mode in (model.eval(), model.train(), model.train(False), model.train(True)):
        assert not any(part.training for part in mode.backbone.modules())
    assert model.head.training
    images = torch.randn(4, 3, 16, 16)
    model.train()
    training = model.backbone(images)
    model.eval()
    assert torch.equal(training, model.backbone(images))


def test_full_trains_everything(data: ImageFolderDataModule, weights: Path) -> None:
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), learning_rate=0.02, policy="full")
    before, modes = state(model), Modes()
    trainer = Trainer(callbacks=modes, **QUIET)
    trainer.fit(model, data)
    metrics = ("val_", "test_")
    assert [name for name in unchanged(before, model) if not name.startswith(metrics)] == []
    assert modes.seen == [(True, True)] * 6
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {"backbone": pytest.approx(0.002), "head": pytest.approx(0.02)}


def test_the_default_is_full(weights: Path) -> None:
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights))
    assert all(p.requires_grad for p in model.parameters())


def test_a_checkpoint_needs_the_weights_no_more(
    data: ImageFolderDataModule, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), policy="frozen", learning_rate=0.3)
    trainer = Trainer(**{**QUIET, "logger": True, "enable_checkpointing": True})
    trainer.fit(model, data)
    assert model.hparams["weights"] == str(weights)  # the run's own record keeps the name
    weights.unlink()
    path = Path(str(trainer.log_dir)) / "checkpoints" / "last.ckpt"
    for cls in (TransferClassifier, L.LightningModule):
        again = cls.load_from_checkpoint(path, weights_only=True)
        assert type(again) is TransferClassifier
        assert (again.policy, again.learning_rate) == ("frozen", 0.3)
        assert not any(p.requires_grad for p in again.backbone.parameters())
        assert len(unchanged(state(model), again)) == len(model.state_dict())
    other = TransferClassifier.load_from_checkpoint(path, weights_only=True, learning_rate=0.5)
    assert other.learning_rate == 0.5


def test_a_frozen_run_resumes_exactly(data: ImageFolderDataModule, weights: Path, tmp_path: Path) -> None:
    def build() -> TransferClassifier:
        torch.manual_seed(1)
        return TransferClassifier(2, backbone="resnet8", weights=str(weights), policy="frozen")

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    whole, rest = build(), build()
    Trainer(callbacks=Save(), **QUIET).fit(whole, data)
    Trainer(**QUIET).fit(rest, data, ckpt_path=tmp_path / "run.ckpt")
    assert len(unchanged(state(whole), rest)) == len(whole.state_dict())


def test_missing_weights() -> None:
    with pytest.raises(ConfigurationError, match=r"`--model.weights` to be an existing file"):
        TransferClassifier(2, backbone="resnet8", weights="none/there.pth")


# ---------------------------------------------------------------------- what is frozen when
STAGES = ["conv1", "layer1", "layer2", "layer3"]


class Watch(L.Callback):
    """At each batch: which stages got gradients, which were in training mode, and the parameters after the batch."""

    def __init__(self) -> None:
        self.gradients: list[list[str]] = []
        self.training: list[list[str]] = []
        self.states: list[dict[str, Tensor]] = []
        self.momentum: list[list[str]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        given = [name for name, p in module.backbone.named_parameters() if p.grad is not None]
        self.gradients.append(stages_of(given))
        modes = [name for name, m in module.backbone.named_modules() if m.training and name]
        self.training.append(stages_of(modes))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.states.append(state(module.backbone))
        kept = trainer.optimizers[0].state
        self.momentum.append(stages_of([name for name, p in module.backbone.named_parameters() if p in kept]))


def stages_of(names: list[str]) -> list[str]:
    """The stages that named parameters or modules are in; the norm after the first convolution is in its stage."""
    return [stage for stage in STAGES if any(n.split(".")[0].replace("bn1", "conv1") == stage for n in names)]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    ("options", "learning"),
    [
        ({"policy": "gradual", "unfreeze_at": [0.2, 0.5, 0.8]}, [0, 0, 1, 2, 2, 4]),  # batch 1 of 6 is at 0.17
        ({"policy": "gradual"}, [0, 1, 3, 4, 4, 4]),  # 0.1, 0.2, 0.3, 0.4: the fifth has no stage
        ({"policy": "lp_ft"}, [0, 0, 0, 4, 4, 4]),
        ({"policy": "lp_ft", "unfreeze_at": [0.7]}, [0, 0, 0, 0, 0, 4]),
    ],
    ids=str,
)
def test_stages_begin_to_learn_from_the_top(
    data: ImageFolderDataModule, weights: Path, options: dict[str, Any], learning: list[int], optimizer: str
) -> None:
    model = TransferClassifier(
        2, backbone="resnet8", weights=str(weights), learning_rate=0.01, optimizer=optimizer, **options
    )
    start, watch = state(model.backbone), Watch()
    trainer = Trainer(callbacks=watch, **QUIET)
    trainer.fit(model, data)
    expected = [STAGES[len(STAGES) - count :] for count in learning]
    assert watch.gradients == expected  # none is computed for a frozen stage
    assert watch.training == expected
    assert watch.momentum == expected  # nothing is saved up
    before = start
    for after, learns in zip(watch.states, expected, strict=True):
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        # every parameter and statistic of a learning stage changes, no bit of a frozen one
        assert changed == [name for name in before if stages_of([name])[0] in learns]
        before = after
    groups = [group["name"] for group in trainer.optimizers[0].param_groups]
    staged = [f"backbone/{stage}" for stage in STAGES] if options["policy"] == "gradual" else ["backbone"]
    assert groups == [*staged, "head"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.backbone.modules())


def test_a_run_that_stops_early_leaves_nothing_frozen(data: ImageFolderDataModule, weights: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), policy="gradual")
    Trainer(callbacks=Stop(), **QUIET).fit(model, data)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.backbone.modules())

    class Break(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        Trainer(callbacks=Break(), **QUIET).fit(model, data)
    watch = Watch()
    trainer = Trainer(callbacks=watch, **QUIET)
    trainer.fit(model, data)  # all is in the optimizer of the next run, which begins frozen
    assert len(trainer.optimizers[0].param_groups) == 5
    assert watch.gradients[0] == []


def test_gradients_are_dropped_where_they_must_be_computed(
    data: ImageFolderDataModule, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain DDP waits for every gradient; the weights are those of a run without these gradients, to the bit."""
    clipped = {**QUIET, "gradient_clip_val": 0.1}  # by the norm of what is not dropped

    def run() -> tuple[dict[str, Tensor], list[int]]:
        torch.manual_seed(1)
        model = TransferClassifier(
            2, backbone="resnet8", weights=str(weights), policy="gradual", learning_rate=0.1, weight_decay=0.1
        )
        computed = [0]
        parameter = model.backbone.conv1.weight
        parameter.register_hook(lambda gradient: computed.append(1))
        Trainer(**clipped).fit(model, data)
        return state(model), computed

    skipped, few = run()
    monkeypatch.setattr("framework.modules.transfer.base.may_skip_backward", lambda trainer: False)
    dropped, all_of_them = run()
    assert (sum(few), sum(all_of_them)) == (3, 6)
    assert not [name for name, value in skipped.items() if not torch.equal(value, dropped[name])]


def test_what_a_strategy_allows() -> None:
    class Stub:
        def __init__(self, strategy: Any) -> None:
            self.strategy = strategy

    allowed = [
        may_skip_backward(Stub(strategy))  # type: ignore[arg-type]
        for strategy in (
            SingleDeviceStrategy(),
            DDPStrategy(find_unused_parameters=True),
            DDPStrategy(find_unused_parameters=True, static_graph=True),
            DDPStrategy(),
        )
    ]
    assert allowed == [True, True, False, False]


def test_milestones_are_met_at_their_very_batch() -> None:
    milestones = (0.1, 0.2, 0.3, 0.4, 0.5)
    for planned in (10, 30, 70, 1000):
        begun = [unfrozen_stages(batch / planned, milestones, 8) for batch in range(planned)]
        assert [begun.index(count) for count in (0, 1, 2, 3, 4, 8)] == [planned * k // 10 for k in range(6)]


def test_progress_does_not_depend_on_accumulation(data: ImageFolderDataModule, weights: Path) -> None:
    class Count(L.Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            self.seen.append(module.unfrozen)

    count = Count()
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), policy="lp_ft")
    Trainer(callbacks=count, accumulate_grad_batches=3, **QUIET).fit(model, data)
    assert count.seen == [0, 0, 0, 4, 4, 4]


def test_a_probe_has_no_graph(weights: Path) -> None:
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), policy="frozen")
    assert model.backbone(torch.randn(2, 3, 16, 16)).grad_fn is None
    assert model(torch.randn(2, 3, 16, 16)).grad_fn is not None


# ---------------------------------------------------------------------- rates
def test_layer_decay() -> None:
    model = TransferClassifier(
        2,
        backbone="resnet8",
        bottleneck_features=8,
        learning_rate=0.1,
        backbone_learning_rate_factor=0.5,
        layer_decay=0.5,
    )
    groups = {group["name"]: group for group in model.parameter_groups()}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == {
        "backbone/conv1": pytest.approx(0.1 * 0.5 * 0.5**3),
        "backbone/layer1": pytest.approx(0.1 * 0.5 * 0.5**2),
        "backbone/layer2": pytest.approx(0.1 * 0.5 * 0.5),
        "backbone/layer3": pytest.approx(0.1 * 0.5),
        "bottleneck": pytest.approx(0.1),
        "head": pytest.approx(0.1),
    }
    assert list(groups)[:4] == [f"backbone/{stage}" for stage in STAGES]
    first = {id(p) for part in (model.backbone.conv1, model.backbone.bn1) for p in part.parameters()}
    assert {id(p) for p in groups["backbone/conv1"]["params"]} == first


@pytest.mark.parametrize("policy", ["full", "gradual", "lp_ft"])
def test_schedules_reach_every_group(data: ImageFolderDataModule, weights: Path, policy: Any) -> None:
    model = TransferClassifier(
        2,
        backbone="resnet8",
        weights=str(weights),
        policy=policy,
        layer_decay=0.5,
        schedule="step",
        schedule_options={"milestones": [4], "factor": 0.1},
    )
    trainer = Trainer(**QUIET)
    trainer.fit(model, data)
    for group, planned in zip(trainer.optimizers[0].param_groups, model.parameter_groups(), strict=True):
        assert group["lr"] == pytest.approx(0.1 * planned["lr"])
        assert group["name"] == planned["name"]


# ---------------------------------------------------------------------- batch norm
@pytest.mark.parametrize("policy", ["full", "gradual"])
@pytest.mark.parametrize("interval", [1.0, 1])
def test_batch_norm_policies(data: ImageFolderDataModule, weights: Path, interval: Any, policy: Any) -> None:
    changed = {}
    for batch_norm in ("train", "source_statistics", "frozen"):
        model = TransferClassifier(
            2,
            backbone="resnet8",
            weights=str(weights),
            batch_norm=batch_norm,  # type: ignore[arg-type]
            policy=policy,
            bottleneck_features=8,
            learning_rate=0.05,
        )
        start = state(model)
        Trainer(val_check_interval=interval, **QUIET).fit(model, data)  # with validation between the batches
        end = state(model)
        moved = {name for name in start if not torch.equal(start[name], end[name])}
        layers = [f"backbone.{n}" for n, m in model.backbone.named_modules() if m in batch_norms(model.backbone)]
        assert len(layers) == 7
        changed[batch_norm] = {
            "statistics": sum(name.endswith(("running_mean", "running_var")) and "backbone" in name for name in moved),
            "scale and shift": sum(
                name.rpartition(".")[0] in layers and name.endswith(("weight", "bias")) for name in moved
            ),
            "bottleneck": sum(name.startswith("bottleneck") and "running" in name for name in moved),
        }
        grouped = {id(p) for group in model.parameter_groups() for p in group["params"]}
        norms = {id(p) for layer in batch_norms(model.backbone) for p in layer.parameters()}
        assert (not grouped & norms) == (batch_norm == "frozen")
    assert changed == {
        "train": {"statistics": 14, "scale and shift": 14, "bottleneck": 2},
        "source_statistics": {"statistics": 0, "scale and shift": 14, "bottleneck": 2},
        "frozen": {"statistics": 0, "scale and shift": 0, "bottleneck": 2},
    }


def test_source_statistics_normalise(weights: Path) -> None:
    model = TransferClassifier(2, backbone="resnet8", weights=str(weights), batch_norm="source_statistics").train()
    images = torch.randn(4, 3, 16, 16)
    training = model.backbone(images)
    assert torch.equal(training, model.eval().backbone(images))
    assert model.train().training
    assert model.backbone.training
    assert not any(layer.training for layer in batch_norms(model.backbone))


# ---------------------------------------------------------------------- messages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "half"}, r"`--model.policy` to be one of full, frozen, gradual, lp_ft, lora, but got 'half'"),
        ({"batch_norm": "eval"}, r"`--model.batch_norm` to be one of train, source_statistics, frozen, but got 'eval'"),
        ({"unfreeze_at": [0.5]}, r"`--model.unfreeze_at` with `--model.policy` gradual or lp_ft, but got \[0.5\]"),
        ({"policy": "frozen", "unfreeze_at": [0.5]}, r"'frozen', which unfreezes nothing"),
        ({"policy": "gradual", "unfreeze_at": [0.5, 0.2]}, r"increasing shares of the run"),
        ({"policy": "gradual", "unfreeze_at": [0.2, 0.2]}, r"increasing shares of the run"),
        ({"policy": "gradual", "unfreeze_at": [0.0, 0.2]}, r"above 0 and below 1, but got \[0.0, 0.2\]"),
        ({"policy": "gradual", "unfreeze_at": [0.2, 1.0]}, r"above 0 and below 1"),
        ({"policy": "gradual", "unfreeze_at": []}, r"above 0 and below 1"),
        ({"policy": "lp_ft", "unfreeze_at": [0.2, 0.5]}, r"one share of the run for `--model.policy lp_ft`"),
        (
            {"policy": "gradual", "unfreeze_at": [0.1, 0.2, 0.3, 0.4, 0.5]},
            r"at most 4 values, one for each stage of the backbone \(conv1, layer1, layer2, layer3\), but got 5",
        ),
        ({"layer_decay": 0.0}, r"`--model.layer_decay` to be above 0 and at most 1, but got 0.0"),
        ({"layer_decay": 1.5}, r"`--model.layer_decay` to be above 0 and at most 1, but got 1.5"),
        ({"layer_decay": 0.5, "policy": "frozen"}, r"`--model.layer_decay` to be 1 with `--model.policy frozen`"),
        ({"lora_rank": 4}, r"`--model.lora_rank` with `--model.policy lora`, but got 4 with 'full'"),
        ({"policy": "lora", "lora_rank": 0}, r"`--model.lora_rank` to be at least 1"),
        ({"policy": "lora", "lora_alpha": 0.0}, r"`--model.lora_alpha` to be above 0"),
        ({"policy": "lora", "lora_dropout": 1.0}, r"`--model.lora_dropout` to be at least 0 and below 1"),
        ({"policy": "lora"}, r"`--model.backbone` to have linear layers, .*got 'resnet8', which has none"),
        (
            {"backbone": "squeezenet1_1", "batch_norm": "frozen"},
            r"`--model.batch_norm` to be 'train' for 'squeezenet1_1', which has no batch normalisation",
        ),
    ],
    ids=str,
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TransferClassifier(2, **{"backbone": "resnet8", **options})


def test_unfreezing_needs_a_run_with_an_end(data: ImageFolderDataModule) -> None:
    model = TransferClassifier(2, backbone="resnet8", policy="gradual")
    with pytest.raises(ConfigurationError, match=r"`--trainer.max_epochs` or `--trainer.max_steps` to bound the run"):
        Trainer(**{**QUIET, "max_epochs": -1}).fit(model, data)
