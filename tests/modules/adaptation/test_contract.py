"""The contract that every method keeps; a new method is tested by existing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from framework.errors import ConfigurationError
from framework.modules import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs
from framework.trainer import Trainer

METHODS: list[type[DomainAdaptation]] = contract.methods()
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
Method = type[DomainAdaptation]


def trained_alike(first: DomainAdaptation, second: DomainAdaptation) -> bool:
    return bool(contract.equal(contract.weights(first), contract.weights(second)))


def test_the_methods_are_found() -> None:
    assert {"SourceOnly", "DANN", "DAN"} <= {method.__name__ for method in METHODS}


@each_method
def test_every_parameter_learns(method: Method, domains: Path) -> None:
    L.seed_everything(0, verbose=False)
    start = contract.weights(contract.build_model(method))
    module = contract.fit(method, domains)
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, start[name]), f"{name} did not change"
    names = [group["name"] for group in module.parameter_groups()]
    assert names[:3] == ["backbone", "bottleneck", "head"]
    grouped = {id(p) for group in module.parameter_groups() for p in group["params"]}
    assert grouped == {id(p) for p in module.parameters() if p.requires_grad}


@each_method
def test_checkpoint_reloads_to_the_same_outputs(method: Method, domains: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    module = contract.fit(method, domains, save=(15, path), max_epochs=3).eval()
    images = torch.randn(5, 3, 16, 16)
    for loader in (method, L.LightningModule):
        loaded = loader.load_from_checkpoint(path, weights_only=True, map_location="cpu").eval()
        assert type(loaded) is method
        assert torch.equal(loaded(images), module(images))
        plain = {name: value for name, value in loaded.hparams.items() if not name.startswith("_")}
        assert plain == dict(module.hparams)
    torch.load(path, weights_only=True)


@each_method
@pytest.mark.parametrize("batches", [5, 7], ids=["epoch border", "mid-epoch"])
def test_resumed_equals_uninterrupted(method: Method, batches: int, domains: Path, tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    whole = contract.fit(method, domains, save=(batches, path))
    assert trained_alike(whole, contract.fit(method, domains, resume=path))


@each_method
@contract.each_precision
def test_resumed_in_other_precisions_equals_uninterrupted(
    method: Method, precision: str, domains: Path, tmp_path: Path
) -> None:
    path = tmp_path / "stop.ckpt"
    whole = contract.fit(method, domains, save=(7, path), max_epochs=2, precision=precision)
    assert all(torch.isfinite(p).all() and p.dtype == contract.PRECISIONS[precision] for p in whole.parameters())
    assert trained_alike(whole, contract.fit(method, domains, resume=path, max_epochs=2, precision=precision))


@pytest.mark.slow
@each_method
def test_resumed_with_workers_equals_uninterrupted(method: Method, domains: Path, tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    whole = contract.fit(method, domains, save=(7, path), data={"num_workers": 2}, max_epochs=2)
    assert trained_alike(whole, contract.fit(method, domains, resume=path, max_epochs=2))
    assert trained_alike(whole, contract.fit(method, domains, resume=path, data={"num_workers": 2}, max_epochs=2))


@pytest.mark.slow
@each_method
def test_resumed_while_accumulating_equals_uninterrupted(method: Method, domains: Path, tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "data": {"steps_per_epoch": 6}, "max_epochs": 2}
    if not method(3, backbone="resnet8").automatic_optimization:
        with pytest.raises(MisconfigurationException, match="accumulate_grad_batches"):
            contract.fit(method, domains, save=(8, path), **options)
        return
    whole = contract.fit(method, domains, save=(8, path), **options)  # 8 = 6 + 2: between two optimizer steps
    assert trained_alike(whole, contract.fit(method, domains, resume=path, **options))


@each_method
def test_same_seed_same_weights(method: Method, domains: Path) -> None:
    first = contract.fit(method, domains, max_epochs=1)
    assert trained_alike(first, contract.fit(method, domains, max_epochs=1))
    assert not trained_alike(first, contract.fit(method, domains, max_epochs=1, seed=1))


@each_method
def test_logging_changes_nothing(method: Method, domains: Path, tmp_path: Path) -> None:
    quiet = contract.fit(method, domains, max_epochs=2)
    logged = contract.fit(
        method,
        domains,
        max_epochs=2,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
        logger=L.loggers.CSVLogger(tmp_path),
    )
    assert trained_alike(quiet, logged)


@each_method
@pytest.mark.parametrize("policy", ["joint", "separate", "domain_specific"])
def test_batch_norm_policies(method: Method, policy: str, domains: Path, tmp_path: Path) -> None:
    if policy in method.refused_batch_norm:
        with pytest.raises(ConfigurationError, match=r"`--model\.batch_norm`"):
            contract.build_model(method, batch_norm=policy)
        return
    path = tmp_path / "stop.ckpt"
    whole = contract.fit(method, domains, save=(3, path), max_epochs=1, model={"batch_norm": policy})
    assert trained_alike(whole, contract.fit(method, domains, resume=path, max_epochs=1, model={"batch_norm": policy}))


@each_method
def test_poisoned_target_labels_change_nothing(method: Method, images: Any, tmp_path: Path) -> None:
    classes = ["ant", "bee", "cat"]
    for name in ("right", "poisoned"):
        images(tmp_path / name / "source", classes, count=13, seed=1)
        # the same files in the same order; in the second tree every class folder has a wrong name
        folders = classes if name == "right" else ["bee", "cat", "dog"]
        images(tmp_path / name / "target", folders, count=9, offset=40, seed=2)
        rotated = classes if name == "right" else classes[1:] + classes[:1]
        images(tmp_path / name / "target_test", rotated, count=5, offset=40, seed=3)
    right = contract.fit(method, tmp_path / "right")
    assert trained_alike(right, contract.fit(method, tmp_path / "poisoned"))


@each_method
def test_validate_test_predict(method: Method, domains: Path, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module, data = contract.build_model(method), contract.build_data(domains)
    (scores, _) = trainer.validate(module, data, verbose=False)
    assert {"val/source_accuracy", "val/target_information_maximization", "val/mmd"} <= trainer.callback_metrics.keys()
    assert not any("dataloader_idx" in name for name in scores)
    (scores,) = trainer.test(module, data, verbose=False)
    assert scores.keys() == {"test/accuracy", "test/mean_class_accuracy", "test/macro_f1", "test/calibration_error"}
    predictions = trainer.predict(module, data)
    assert predictions is not None
    assert sum(len(batch["paths"]) for batch in predictions) == 31  # type: ignore[index, call-overload]


ALIGNED = [
    method for method in METHODS if isinstance(getattr(method(3, backbone="resnet8"), "alignment", None), AlignmentLoss)
]
each_aligned = pytest.mark.parametrize("method", ALIGNED, ids=lambda method: method.__name__)


def outputs(domain: str) -> NetworkOutputs:
    shift = torch.linspace(0, 1, 3) if domain == "target" else torch.zeros(3)
    features = (torch.randn(8, 16) + shift.mean()).requires_grad_()
    labels = torch.arange(8) % 3 if domain == "source" else None
    return NetworkOutputs(features, (torch.randn(8, 3) + shift).requires_grad_(), labels)


@pytest.mark.slow
@each_aligned
def test_alignment_loss_compiles_to_one_graph(method: Method) -> None:
    alignment = contract.build_model(method).alignment
    source, target, progress = outputs("source"), outputs("target"), torch.tensor(0.3)
    explanation = torch._dynamo.explain(alignment)(source, target, progress)
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(alignment, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = alignment(source, target, progress)
    inputs = [source.features, source.logits, target.features, target.logits]
    expected_gradients = torch.autograd.grad(expected, inputs, allow_unused=True)
    torch.manual_seed(1)
    loss = compiled(source, target, progress)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    torch.testing.assert_close(loss, expected)
    assert any(gradient is not None for gradient in gradients)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        zero = torch.zeros(())  # an input that plays no part
        torch.testing.assert_close(
            zero if gradient is None else gradient, zero if expected_gradient is None else expected_gradient
        )


@pytest.mark.slow
@each_method
def test_backbone_compiles_to_one_graph(method: Method) -> None:
    module = contract.build_model(method)
    explanation = torch._dynamo.explain(module.backbone)(torch.randn(4, 3, 16, 16))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    torch._dynamo.reset()


@each_method
def test_compile_option_keeps_the_names(method: Method) -> None:
    module = contract.build_model(method, compile=True)
    names = list(module.state_dict())
    module.configure_model()
    assert list(module.state_dict()) == names
    assert module.backbone._compiled_call_impl is not None


@each_aligned
def test_alignment_is_right_under_autocast(method: Method) -> None:
    alignment = contract.build_model(method).alignment
    source, target, progress = outputs("source"), outputs("target"), torch.tensor(0.3)
    torch.manual_seed(1)
    expected = alignment(source, target, progress)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment(source, target, progress)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-3)


@each_aligned
def test_alignment_needs_no_lightning_and_progress_is_an_argument(method: Method) -> None:
    alignment = contract.build_model(method).alignment.eval()  # what is measured in training may be smoothed
    source, target = outputs("source"), outputs("target")
    torch.manual_seed(1)
    first = alignment(source, target, torch.tensor(0.5))
    assert first.shape == ()
    alignment(source, target, torch.tensor(0.9))
    # no hidden counter: the same arguments give the same loss
    torch.manual_seed(1)
    torch.testing.assert_close(alignment(source, target, torch.tensor(0.5)), first)
    assert all(value.shape == () and not value.requires_grad for value in alignment.diagnostics.values())
