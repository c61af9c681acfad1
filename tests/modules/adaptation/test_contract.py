"""The contract that every method keeps; a new method is tested by existing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import lightning.pytorch as L
import pytest
import torch

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
    assert grouped == {id(p) for p in module.parameters()}


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
def test_resumed_with_workers_equals_uninterrupted(method: Method, domains: Path, tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    whole = contract.fit(method, domains, save=(7, path), data={"num_workers": 2}, max_epochs=2)
    assert trained_alike(whole, contract.fit(method, domains, resume=path, max_epochs=2))
    assert trained_alike(whole, contract.fit(method, domains, resume=path, data={"num_workers": 2}, max_epochs=2))


@each_method
def test_resumed_while_accumulating_equals_uninterrupted(method: Method, domains: Path, tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "data": {"steps_per_epoch": 6}, "max_epochs": 2}
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
def test_bf16_mixed(method: Method, domains: Path) -> None:
    module = contract.fit(method, domains, precision="bf16-mixed", max_epochs=1)
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in module.parameters())


@each_method
@pytest.mark.parametrize("policy", ["joint", "separate", "domain_specific"])
def test_batch_norm_policies(method: Method, policy: str, domains: Path, tmp_path: Path) -> None:
    if method.__name__ == "SourceOnly" and policy == "domain_specific":
        pytest.skip("refused: tested in test_base")
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


def outputs(*shape: int, shift: float = 0.0) -> NetworkOutputs:
    features = (torch.randn(*shape) + shift).requires_grad_()
    return NetworkOutputs(features, (torch.randn(shape[0], 3) + shift).requires_grad_())


@each_aligned
def test_alignment_loss_compiles_to_one_graph(method: Method) -> None:
    alignment = contract.build_model(method).alignment
    source, target, progress = outputs(8, 16), outputs(8, 16, shift=1.0), torch.tensor(0.3)
    explanation = torch._dynamo.explain(alignment)(source, target, progress)
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(alignment, fullgraph=True, backend="aot_eager")
    expected = alignment(source, target, progress)
    (expected_gradient,) = torch.autograd.grad(expected, source.features)
    loss = compiled(source, target, progress)
    (gradient,) = torch.autograd.grad(loss, source.features)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


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
    source, target, progress = outputs(8, 16), outputs(8, 16, shift=1.0), torch.tensor(0.3)
    expected = alignment(source, target, progress)
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment(source, target, progress)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-3)


@each_aligned
def test_alignment_needs_no_lightning_and_progress_is_an_argument(method: Method) -> None:
    alignment = contract.build_model(method).alignment
    source, target = outputs(8, 16), outputs(8, 16, shift=1.0)
    first = alignment(source, target, torch.tensor(0.5))
    assert first.shape == ()
    alignment(source, target, torch.tensor(0.9))
    # no hidden counter: the same arguments give the same loss (batch statistics of a discriminator included)
    torch.testing.assert_close(alignment(source, target, torch.tensor(0.5)), first)
    assert all(value.shape == () and not value.requires_grad for value in alignment.diagnostics.values())


@each_aligned
def test_adaptation_helps_on_a_toy_shift(method: Method) -> None:
    """Dimension 0 tells the classes best in the source and is noise in the target; dimension 1 is the same in both.

    A classifier of the source alone leans on dimension 0. Features that look alike in both domains cannot use it: in
    the source it goes together with dimension 1, in the target it does not.
    """
    source_only = [toy_accuracy(method, 0.0, seed) for seed in range(3)]
    adapted = [toy_accuracy(method, 1.0, seed) for seed in range(3)]
    assert max(source_only) < 0.8
    assert min(adapted) > 0.85  # by dimension 1 alone: 0.977


def toy_accuracy(method: Method, trade_off: float, seed: int, steps: int = 300) -> float:
    generator = torch.Generator().manual_seed(seed)

    def sample(count: int, domain: str) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(2, (count,), generator=generator)
        values = (2.0 * labels - 1)[:, None] + torch.tensor([0.3, 0.5]) * torch.randn(count, 2, generator=generator)
        if domain == "target":
            values[:, 0] = 1.1 * torch.randn(count, generator=generator)
        return values, labels

    torch.manual_seed(seed)
    features = torch.nn.Linear(2, 16)
    head = torch.nn.Linear(16, 2)
    alignment = contract.build_model(method).alignment
    parameters = [*features.parameters(), *head.parameters(), *alignment.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    for step in range(steps):
        (values, labels), (target_values, _) = sample(64, "source"), sample(64, "target")
        hidden = features(torch.cat([values, target_values]))
        source, target = NetworkOutputs(hidden, head(hidden)).split(64)
        loss = torch.nn.functional.cross_entropy(source.logits, labels)
        loss = loss + trade_off * alignment(source, target, torch.tensor(step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values, labels = sample(1000, "target")
    return float((head(features(values)).argmax(1) == labels).float().mean())
