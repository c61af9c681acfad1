"""The base of the methods: one forward, batch-norm policies, parameter groups, the loss, validation scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from framework.batch import DomainBatch, LabelledBatch
from framework.datamodules import DomainPairDataModule
from framework.errors import ConfigurationError
from framework.functional import unbiased_mmd
from framework.modules import DAN, DANN, SourceOnly
from framework.networks import DomainSpecificBatchNorm
from framework.trainer import Trainer

OPTIONS: dict[str, Any] = {"backbone": "resnet8", "bottleneck_features": 16}


def data(root: Path, **options: Any) -> DomainPairDataModule:
    defaults = {"batch_size": 4, "steps_per_epoch": 5, "image_size": 16, "crop": "none", "num_workers": 0}
    return DomainPairDataModule(
        str(root / "source"), str(root / "target"), target_test=str(root / "target_test"), **{**defaults, **options}
    )


def trainer(**options: Any) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{**quiet, "max_epochs": 1, **options})


def test_one_forward_equals_two_in_eval_mode() -> None:
    module = DANN(3, **OPTIONS).double().eval()
    source, target = torch.randn(5, 3, 16, 16).double(), torch.randn(7, 3, 16, 16).double()
    joint = module.domain_outputs(source, target)
    for outputs, images in zip(joint, (source, target), strict=True):
        alone = module.outputs(images)
        torch.testing.assert_close(outputs.features, alone.features)
        torch.testing.assert_close(outputs.logits, alone.logits)


def test_joint_batch_norm_mixes_the_domains_and_separate_does_not() -> None:
    source, target = torch.randn(6, 3, 16, 16), 3 + torch.randn(6, 3, 16, 16)
    other = 9 * torch.randn(6, 3, 16, 16)
    for policy, alike in (("joint", False), ("separate", True), ("domain_specific", True)):
        module = DANN(3, batch_norm=policy, **OPTIONS).train()
        first, _ = module.domain_outputs(source, target)
        second, _ = module.domain_outputs(source, other)
        assert torch.allclose(first.logits, second.logits, atol=1e-5) is alike, policy


def test_domain_specific_batch_norm_learns_each_domain_and_tests_with_the_targets() -> None:
    module = DANN(3, batch_norm="domain_specific", **OPTIONS).train()
    layer = module.backbone.bn1
    assert isinstance(layer, DomainSpecificBatchNorm)
    module.domain_outputs(torch.randn(8, 3, 16, 16), 5 + torch.randn(8, 3, 16, 16))
    assert (layer.source.running_mean - layer.target.running_mean).abs().max() > 0.05
    module.eval()
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(module(images), module.outputs_in("target", images).logits)
    assert not torch.allclose(module(images), module.outputs_in("source", images).logits)
    assert layer.domain == "target"  # whatever was asked in between


def test_source_only_never_sees_the_target_in_training() -> None:
    module = SourceOnly(3, **OPTIONS).train()
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    seen: list[int] = []
    module.backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    target = torch.full((4, 3, 16, 16), float("nan"))
    source = LabelledBatch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    loss = module.training_step(DomainBatch(source, target), 0)
    assert loss is not None
    assert torch.isfinite(loss)
    assert seen == [4]
    assert all(torch.isfinite(buffer).all() for buffer in module.buffers() if buffer.is_floating_point())


def test_source_only_refuses_domain_specific_batch_norm() -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.batch_norm.*SourceOnly"):
        SourceOnly(3, batch_norm="domain_specific", **OPTIONS)


def test_loss_is_classification_plus_trade_off_times_alignment(domains: Path) -> None:
    """The logged terms against an independent computation on the same batch, with the same weights."""

    class Terms(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: DomainBatch, batch_idx: int) -> None:
            state = {name: value.clone() for name, value in module.state_dict().items()}
            outputs = module.head(module.bottleneck(module.backbone(torch.cat([batch.source.images, batch.target]))))
            features = module.bottleneck(module.backbone(torch.cat([batch.source.images, batch.target])))
            log_p = torch.log_softmax(outputs[:4], 1)
            self.classification = -log_p[range(4), batch.source.labels].mean()
            self.alignment = unbiased_mmd(features[:4], features[4:])
            module.load_state_dict(state)

        def on_train_batch_end(
            self, trainer: L.Trainer, module: Any, outputs: Any, batch: DomainBatch, batch_idx: int
        ) -> None:
            expected = self.classification + 0.7 * self.alignment
            torch.testing.assert_close(outputs["loss"], expected.detach())

    L.seed_everything(0, verbose=False)
    trainer(callbacks=[Terms()]).fit(DAN(3, trade_off=0.7, **OPTIONS), data(domains))


def test_backbone_learns_at_its_own_rate() -> None:
    module = DANN(3, learning_rate=0.1, **OPTIONS)
    rates = {group["name"]: group["lr"] for group in module.parameter_groups()}
    assert rates == pytest.approx({"backbone": 0.01, "bottleneck": 0.1, "head": 0.1, "alignment": 0.1})


def test_progress_counts_batches_not_optimizer_steps(domains: Path) -> None:
    class Progress(L.Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            assert module.progress.shape == ()
            self.values.append(float(module.progress))

    record = Progress()
    trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[record]).fit(DANN(3, **OPTIONS), data(domains))
    assert record.values == pytest.approx([i / 10 for i in range(10)])
    record = Progress()
    trainer(max_epochs=-1, max_steps=4, callbacks=[record]).fit(DANN(3, **OPTIONS), data(domains))
    assert record.values == pytest.approx([i / 4 for i in range(4)])


def test_diagnostics_are_logged(domains: Path, tmp_path: Path) -> None:
    logger = L.loggers.CSVLogger(tmp_path)
    run = trainer(logger=logger, log_every_n_steps=5, callbacks=[], max_epochs=2)
    run.fit(DANN(3, **OPTIONS), data(domains))
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {
        "train/loss",
        "train/classification_loss",
        "train/alignment_loss",
        "train/domain_accuracy",
        "train/domain_loss",
        "train/reversal_coefficient",
        "train/gradient_norm/backbone",
        "train/gradient_norm/alignment",
        "train/learning_rate/backbone",
        "train/learning_rate/head",
        "val/source_accuracy",
        "val/target_information_maximization",
        "val/mmd",
    } <= set(header)


def test_validation_scores_against_independent_ones(domains: Path) -> None:
    L.seed_everything(0, verbose=False)
    module, pair = DANN(3, **OPTIONS), data(domains, val_fraction=0.3)
    run = trainer()
    run.validate(module, pair, verbose=False)
    module.eval()
    source, target = pair.val_dataloader()
    with torch.no_grad():
        batches = [pair.on_after_batch_transfer(batch, 0) for batch in source]
        images, labels, _ = (torch.cat(parts) for parts in zip(*batches, strict=True))
        targets = torch.cat([pair.on_after_batch_transfer(batch, 1) for batch in target])
        accuracy = (module(images).argmax(1) == labels).double().mean()
        p = module(targets).double().softmax(1)
        mean = p.mean(0)
        information = -(mean * mean.log()).sum() + (p * p.log()).sum(1).mean()
        mmd = unbiased_mmd(module.outputs(images).features.double(), module.outputs(targets).features.double())
    scores = {name: float(value) for name, value in run.callback_metrics.items()}
    assert scores["val/source_accuracy"] == pytest.approx(float(accuracy))
    assert scores["val/target_information_maximization"] == pytest.approx(float(information), abs=1e-5)
    assert scores["val/mmd"] == pytest.approx(float(mmd), abs=1e-4)


def test_classifier_without_bottleneck(domains: Path) -> None:
    module = DAN(3, backbone="resnet8", bottleneck_features=0)
    assert isinstance(module.bottleneck, nn.Identity)
    assert module.num_features == 64
    trainer().fit(module, data(domains))


def complaints(classes: int, batch: int, progress: float = 0.5, **means: float) -> list[str]:
    module = SourceOnly(classes, **OPTIONS)
    module.watch_target(torch.randn(batch, classes))
    return [key for key, _ in module.complaints({f"train/{name}": value for name, value in means.items()}, progress)]


def test_collapsing_predictions_are_complained_about() -> None:
    assert complaints(10, 64, target_marginal_entropy=math.log(3.2)) == ["collapse"]
    assert complaints(10, 64, target_marginal_entropy=math.log(4.0)) == []
    assert complaints(10, 64, progress=0.1, target_marginal_entropy=0.0) == []  # too early to say
    # two classes, 9 to 1: so they may be
    assert complaints(2, 64, target_marginal_entropy=-(0.9 * math.log(0.9) + 0.1 * math.log(0.1))) == []
    assert complaints(2, 64, target_marginal_entropy=0.05) == ["collapse"]
    # a batch of 32 cannot show more than 32 of 345 classes
    assert complaints(345, 32, target_marginal_entropy=math.log(20.0)) == []
    assert complaints(345, 32, target_marginal_entropy=math.log(5.0)) == ["collapse"]


def test_an_unlearned_source_is_complained_about() -> None:
    assert complaints(10, 64, classification_loss=2.2) == ["source"]
    assert complaints(10, 64, classification_loss=1.5) == []
    assert complaints(10, 64, progress=0.2, classification_loss=2.3) == []


def test_complaints_are_shown_once(domains: Path, recwarn: pytest.WarningsRecorder) -> None:
    frozen = {"learning_rate": 0.0, "backbone_learning_rate_factor": 0.0, "label_smoothing": 0.5}
    trainer(log_every_n_steps=1, max_epochs=3).fit(DANN(3, **OPTIONS, **frozen), data(domains))
    shown = [str(warning.message) for warning in recwarn if "the source is not learned" in str(warning.message)]
    assert len(shown) == 1
    assert shown[0].startswith("At batch ")
    assert "of 15" in shown[0]
    assert "`--model.trade_off`" in shown[0]


def test_gradient_norms_of_the_alignment_alone(domains: Path) -> None:
    """The logged norm is that of the weighted alignment loss where it reaches the features, without the
    classification's."""

    class Norms(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: DomainBatch, batch_idx: int) -> None:
            state = {name: value.clone() for name, value in module.state_dict().items()}
            features = module.bottleneck(module.backbone(torch.cat([batch.source.images, batch.target]))).detach()
            module.load_state_dict(state)
            parts = features[:4].requires_grad_(), features[4:].clone().requires_grad_()
            gradients = torch.autograd.grad(0.7 * unbiased_mmd(*parts), parts)
            self.expected = {d: float(g.norm()) for d, g in zip(("source", "target"), gradients, strict=True)}

        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            kept = {name: mean for name, mean in module._means.means().items() if "alignment_grad" in name}
            named = {f"train/alignment_gradient_norm/{domain}_features": v for domain, v in self.expected.items()}
            assert kept == pytest.approx(named, rel=1e-3)

    L.seed_everything(0, verbose=False)
    trainer(callbacks=[Norms()], max_steps=1, log_every_n_steps=1).fit(DAN(3, trade_off=0.7, **OPTIONS), data(domains))


def test_gradient_norms_are_measured_where_a_row_is_due(domains: Path) -> None:
    """A hook in the backward pass costs what ten operations do."""
    kept: list[int] = []

    class Kept(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            kept.append(sum("gradient_norm" in name for name in module._means.means()))

    trainer(callbacks=[Kept()], max_steps=4, log_every_n_steps=4).fit(DAN(3, **OPTIONS), data(domains))
    assert kept == [0, 0, 0, 2]
