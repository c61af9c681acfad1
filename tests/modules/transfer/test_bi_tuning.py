"""Bi-Tuning: both contrasts against a loop over a run's own queues, views, momentum, resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from source_task import CLASSES, build_data, differing, fit, write_weights
from torch import Tensor

from framework import BiTuning
from framework.batch import LabelledBatch
from framework.errors import ConfigurationError

Build = Callable[[], BiTuning]
Keys = dict[int, list[Tensor]]


@pytest.fixture(scope="module")
def root(images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data"), ["a", "b", "c"], count=10)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "source.pth")


def builder(file: Path, **options: Any) -> Build:
    defaults: dict[str, Any] = {
        "backbone": "resnet8",
        "learning_rate": 0.05,
        "backbone_learning_rate_factor": 0.5,
        "queue_length": 4,
        "projection_features": 5,
        "momentum": 0.9,
    }
    return lambda: BiTuning(CLASSES, weights=str(file), **{**defaults, **options})


class World:
    """What a step asks of the trainer."""

    world_size = 1
    accumulate_grad_batches = 1


def detached(file: Path, **options: Any) -> BiTuning:
    model = builder(file, **options)().double().train()
    model._trainer = World()  # type: ignore[assignment]
    return model


def batches(count: int, views: int) -> list[LabelledBatch]:
    shape = (6, 2, 3, 16, 16) if views == 2 else (6, 3, 16, 16)
    return [LabelledBatch(torch.randn(shape, dtype=torch.float64), torch.randint(CLASSES, (6,))) for _ in range(count)]


# ------------------------------------------------------------------ the term
def unit(vector: Tensor) -> Tensor:
    return vector / math.sqrt(sum(float(value) ** 2 for value in vector))


def contrast(query: Tensor, partner: Tensor, keys: Keys, label: int, temperature: float) -> float:
    """Of one image: minus the mean log-probability of its partner and its class's keys, among all."""
    positive = [math.exp(float(unit(query) @ unit(partner)) / temperature)]
    positive += [math.exp(float(unit(query) @ key) / temperature) for key in keys[label]]
    negative = [
        math.exp(float(unit(query) @ key) / temperature) for other in keys if other != label for key in keys[other]
    ]
    everything = sum(positive) + sum(negative)
    return -sum(math.log(power / everything) for power in positive) / len(positive)


@pytest.mark.parametrize("views", [1, 2])
def test_the_term_against_a_loop_over_four_batches(file: Path, views: int) -> None:
    """The queues here are lists of each class's last four keys; the 24 images fill them and push the first ones out."""
    model = detached(file, bottleneck_features=7, temperature=0.5)
    feature_keys: Keys = {label: [] for label in range(CLASSES)}
    projection_keys: Keys = {label: [] for label in range(CLASSES)}
    one = torch.ones(1, dtype=torch.float64)
    for batch in batches(4, views):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        outputs = model.outputs(batch.images)
        first, second = (batch.images[:, 0], batch.images[:, 1]) if views == 2 else (batch.images, batch.images)
        # batch statistics: what the running ones are does not matter in training mode
        torch.testing.assert_close(model.bottleneck(model.backbone(first)), outputs.features)
        key_features = model.key_encoder.copies(second)
        key_projections = model.key_projector.copies(key_features)
        projections = model.projector(outputs.features)
        by_class, by_instance = 0.0, 0.0
        for i, label in enumerate(batch.labels.tolist()):
            prototype = torch.cat([model.head.weight[label], model.head.bias[label : label + 1]]).detach()
            features = torch.cat([outputs.features[i], one]).detach()
            by_class += contrast(prototype, features, feature_keys, label, 0.5) / 6
            by_instance += contrast(projections[i].detach(), key_projections[i], projection_keys, label, 0.5) / 6
        found = model.regularization(outputs, batch)
        assert found.item() == pytest.approx(by_class + by_instance)
        assert model.diagnostics["class_contrast"].item() == pytest.approx(by_class)
        assert model.diagnostics["instance_contrast"].item() == pytest.approx(by_instance)
        for i, label in enumerate(batch.labels.tolist()):
            feature_keys[label] = [*feature_keys[label], unit(torch.cat([key_features[i], one]))][-4:]
            projection_keys[label] = [*projection_keys[label], unit(key_projections[i])][-4:]
    assert max(map(len, feature_keys.values())) == 4


@pytest.mark.parametrize("prototype_gradient", [False, True])
def test_where_the_gradient_goes(file: Path, prototype_gradient: bool) -> None:
    model = detached(file, prototype_gradient=prototype_gradient)
    for batch in batches(2, 2):
        found = model.regularization(model.outputs(batch.images), batch)
    found.backward()  # though the queues have changed since
    for part in (model.backbone, model.projector):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
    assert all((p.grad is not None) is prototype_gradient for p in model.head.parameters())
    assert all(p.grad is None for part in (model.key_encoder, model.key_projector) for p in part.parameters())


def test_the_defaults_are_tllibs(file: Path) -> None:
    model = BiTuning(CLASSES, backbone="resnet8", weights=str(file))
    assert (model.trade_off, model.temperature, model.key_encoder.momentum) == (1.0, 0.07, 0.999)
    assert model.feature_queue.keys.shape == (CLASSES, 40, 65)
    assert model.projection_queue.keys.shape == (CLASSES, 40, 128)
    assert model.prototype_gradient is False


def test_the_projector_learns_at_the_backbones_rate(file: Path) -> None:
    groups = {group["name"]: group["lr"] for group in builder(file)().parameter_groups()}
    assert groups == {"backbone": 0.025, "head": 0.05, "projector": 0.025}


# ------------------------------------------------------------------ the copies
class Weights(L.Callback):
    """The first weight of backbone and key encoder when each batch begins, and the modes of both."""

    def __init__(self) -> None:
        self.backbone: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.steps: list[int] = []
        self.alike = True

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.backbone.append(next(module.backbone.parameters()).detach().clone())
        self.steps.append(trainer.global_step)

    def on_before_zero_grad(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        copies = module.key_encoder.copies[0]
        modes = [[part.training for part in encoder.modules()] for encoder in (copies, module.backbone)]
        self.alike &= modes[0] == modes[1]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.keys.append(next(module.key_encoder.parameters()).detach().clone())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_copies_follow_once_for_each_step(root: Path, file: Path, accumulate: int) -> None:
    seen = Weights()
    fit(builder(file), root, callbacks=seen, accumulate_grad_batches=accumulate, data={"steps_per_epoch": 5})
    average, step = seen.backbone[0], 0
    for weight, key, steps in zip(seen.backbone, seen.keys, seen.steps, strict=True):
        if steps != step:  # the weights are new
            average, step = 0.9 * average + 0.1 * weight, steps
        torch.testing.assert_close(key, average)
    assert seen.steps[-1] == {1: 14, 2: 8}[accumulate]
    assert seen.alike


def test_a_frozen_backbone_has_a_frozen_copy(root: Path, file: Path) -> None:
    seen = Weights()
    model = fit(builder(file, policy="frozen"), root, callbacks=seen)
    ours, theirs = model.backbone.state_dict(), model.key_encoder.copies[0].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert seen.alike


# ------------------------------------------------------------------ views
def test_views_of_the_data(root: Path) -> None:
    one, two = build_data(root), build_data(root, views=2)
    loaded = []
    for data in (one, two):
        data.setup("fit")
        loaded.append([data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()])
    for single, double in zip(*loaded, strict=True):
        assert double.images.shape == (4, 2, 3, 16, 16)
        assert torch.equal(single.images, double.images[:, 0])  # the run with one view sees the same first views
        assert torch.equal(single.labels, double.labels)
        assert not torch.equal(double.images[:, 0], double.images[:, 1])
    assert next(iter(two.val_dataloader())).images.dim() == 4
    assert next(iter(two.unaugmented_train_dataloader())).images.dim() == 4
    with pytest.raises(ConfigurationError, match=r"`--data\.views` to be at least 1, but got 0"):
        build_data(root, views=0)


def test_three_views_are_refused(root: Path, file: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`--data\.views` to be 1 or 2, on which BiTuning trains, but got 3"):
        fit(builder(file), root, data={"views": 3})


def test_sample_images_show_both_views(root: Path, file: Path, tmp_path: Path) -> None:
    fit(builder(file), root, data={"views": 2}, max_epochs=1, logger=None, default_root_dir=tmp_path)
    assert list(tmp_path.rglob("events.*"))


# ------------------------------------------------------------------ runs
@pytest.mark.parametrize("views", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(root: Path, file: Path, tmp_path: Path, views: int) -> None:
    options: dict[str, Any] = {"data": {"views": views}}
    build = builder(file, bottleneck_features=8, bottleneck_dropout=0.5)
    whole = fit(build, root, save=(7, tmp_path / "run.ckpt"), **options)
    resumed = fit(build, root, resume=tmp_path / "run.ckpt", **options)
    assert differing(whole, resumed) == []
    assert whole.feature_queue.seen.sum() == 60


def test_resumed_between_accumulated_steps(root: Path, file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "data": {"steps_per_epoch": 6}}
    whole = fit(builder(file), root, save=(8, tmp_path / "run.ckpt"), **options)
    assert differing(whole, fit(builder(file), root, resume=tmp_path / "run.ckpt", **options)) == []


def test_a_checkpoint_needs_the_weights_no_more(root: Path, tmp_path: Path) -> None:
    file = write_weights(tmp_path / "weights.pth")
    model = fit(builder(file, temperature=0.2), root, save=(5, tmp_path / "run.ckpt"), max_epochs=1)
    file.unlink()
    for cls in (BiTuning, L.LightningModule):
        again = cls.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert type(again) is BiTuning
        assert again.temperature == 0.2
        assert differing(model, again) == []


def test_under_bfloat16_the_queues_hold_unit_vectors_in_float32(root: Path, file: Path) -> None:
    model = fit(builder(file), root, precision="bf16-mixed", max_epochs=1)
    for queue in (model.feature_queue, model.projection_queue):
        assert queue.keys.dtype == torch.float32
        lengths = torch.cat([queue.keys[label, : int(queue.filled[label])].norm(dim=1) for label in range(CLASSES)])
        torch.testing.assert_close(lengths, torch.ones(len(lengths)))


def test_compiled(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_(self: torch.nn.Module) -> None:
        compiled.append(type(self).__name__)
        self._compiled_call_impl = self._call_impl  # type: ignore[assignment]

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    model = builder(file, compile=True)()
    model.configure_model()
    model.configure_model()
    assert compiled == ["ResidualNetwork"] * 2


def test_bad_values_name_the_flag(file: Path) -> None:
    for name, value, range_ in (
        ("queue_length", 0, "at least 1"),
        ("projection_features", 0, "at least 1"),
        ("momentum", 1.5, r"in \[0, 1\]"),
        ("temperature", 0, "above 0"),
    ):
        with pytest.raises(ConfigurationError, match=rf"`--model\.{name}` to be {range_}, but got {value}"):
            builder(file, **{name: value})()
