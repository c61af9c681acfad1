"""Fused optimizers by default: where, that they compute the same, and that runs resume across the settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import contract
import lightning.pytorch as L
import pytest
import torch

from framework import DANN, MCD, SourceOnly, TransferClassifier
from framework.modules.optimization import begin_momentum, fused_by_default

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"nesterov": False, "momentum": 0.0}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
]


def build(**options: Any) -> tuple[TransferClassifier, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TransferClassifier(2, backbone="resnet8", **options).double()
    made = model.configure_optimizers()
    assert isinstance(made, torch.optim.Optimizer)
    return model, made


def ways(optimizer: torch.optim.Optimizer) -> set[Any]:
    return {group.get("fused") for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"optimizer": "Adam"}, True),
        ({"optimizer": "AdamW"}, True),
        ({"optimizer_options": {"fused": False}}, False),
        ({"optimizer_options": {"fused": True}}, True),
        ({"optimizer_options": {"foreach": True}}, None),
        ({"optimizer": "Adam", "optimizer_options": {"differentiable": True}}, None),
        ({"optimizer_options": {"dampening": 0.1, "nesterov": False}}, None),
        ({"optimizer": "RMSprop"}, None),
        ({"optimizer": "Adagrad"}, None),
    ],
)
def test_where(options: dict[str, Any], expected: bool | None) -> None:
    assert ways(build(**options)[1]) == {expected}


def test_on_devices_and_dtypes_that_have_it() -> None:
    def asked(device: str, dtype: torch.dtype = torch.float32) -> bool:
        here = torch.zeros(2, requires_grad=True)
        there = torch.zeros(2, requires_grad=True, device=device, dtype=dtype)
        return fused_by_default(torch.optim.SGD, {}, [{"params": [here]}, {"params": [there]}])

    assert asked("cpu")
    assert asked("cpu", torch.bfloat16)
    assert not asked("meta")
    assert not asked("cpu", torch.complex64)


@pytest.mark.parametrize("scaler", [None, object()])
def test_not_with_a_loss_scale(scaler: Any) -> None:
    """16-mixed: Lightning refuses to clip the gradients of an optimizer that unscales them by itself."""
    model = TransferClassifier(2, backbone="resnet8")
    model._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))  # type: ignore[assignment]
    made = model.configure_optimizers()
    assert ways(made) == {True if scaler is None else None}  # type: ignore[arg-type]
    assert getattr(made, "_step_supports_amp_scaling", False) is (scaler is None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_are_clipped_in_every_precision(precision: Any, clip: float | None, domains: Path) -> None:
    options: dict[str, Any] = {"precision": precision, "gradient_clip_val": clip, "max_epochs": 1}
    L.seed_everything(0, verbose=False)
    start = contract.weights(contract.build_model(DANN))
    module = contract.fit(DANN, domains, model={"optimizer_options": {"momentum": 0.0, "nesterov": False}}, **options)
    assert ways(module.trainer.optimizers[0]) == {None if clip and precision == "bf16-mixed" else True}
    moved = torch.cat([(p.detach() - start[name]).flatten() for name, p in module.named_parameters()]).norm()
    # five steps at a learning rate of 0.05, and weight decay
    assert (moved < 5 * 0.05 * (0.01 + 1e-3 * 40)) == (clip is not None)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    parameters = sorted(model.named_parameters())
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for _, parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.grad = torch.empty_like(parameter).copy_(gradient).detach()  # laid out as autograd does it
        optimizer.step()


def close(one: torch.nn.Module, two: torch.nn.Module) -> None:
    for (key, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("after", [True, False], ids=["to fused", "to plain"])
@pytest.mark.parametrize("before", [True, False], ids=["from fused", "from plain"])
@pytest.mark.parametrize("layouts", [(False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(("name", "options"), KINDS, ids=[f"{name} {options}" for name, options in KINDS])
def test_goes_on_from_the_other_way(
    name: str, options: dict[str, Any], layouts: tuple[bool, bool], before: bool, after: bool, tmp_path: Path
) -> None:
    """In the other layout of the weights, too."""
    settings: dict[str, Any] = {"optimizer": name, "learning_rate": 0.05}
    reference, whole = build(**settings, optimizer_options={**options, "foreach": False}, channels_last=False)
    steps(reference, whole, 0, 6)
    state: dict[str, Any] = {}
    for part, fused in enumerate((before, after)):
        model, optimizer = build(
            **settings,
            optimizer_options={**options, **({} if fused else {"fused": False})},
            channels_last=layouts[part],
        )
        if state:
            state = torch.load(tmp_path / "state.pth", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        assert ways(optimizer) == {fused}
        steps(model, optimizer, 3 * part, 3 * part + 3)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / "state.pth")
    close(model, reference)


@pytest.mark.parametrize(("name", "options"), KINDS, ids=[f"{name} {options}" for name, options in KINDS])
def test_a_parameter_whose_first_gradient_comes_later(name: str, options: dict[str, Any]) -> None:
    models = []
    for way in ({}, {"foreach": False}):
        model, optimizer = build(optimizer=name, learning_rate=0.05, optimizer_options={**options, **way})
        for step in range(4):
            for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
                late = index % 3 == 0 and step < 2
                generator = torch.Generator().manual_seed(100 * step + index)
                gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.grad = None if late else torch.empty_like(parameter).copy_(gradient).detach()
            begin_momentum(optimizer)
            optimizer.step()
        models.append(model)
    close(*models)


def test_the_trainer_resumes_checkpoints_from_before(domains: Path, tmp_path: Path) -> None:
    path = tmp_path / "before.ckpt"
    plain = {"optimizer": "AdamW", "channels_last": False, "optimizer_options": {"fused": False}}
    before = contract.fit(SourceOnly, domains, save=(7, path), model=plain, precision="64-true")
    checkpoint = torch.load(path, weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        assert group.pop("fused") is False
    torch.save(checkpoint, path)
    after = contract.fit(SourceOnly, domains, resume=path, model={"optimizer": "AdamW"}, precision="64-true")
    optimizer = after.trainer.optimizers[0]
    assert ways(optimizer) == {True}
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
    for key, value in contract.weights(after).items():
        torch.testing.assert_close(value, contract.weights(before)[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", [DANN, MCD])
def test_training_is_the_same(method: Any, domains: Path) -> None:
    found = [
        contract.fit(method, domains, model={"optimizer_options": options}, precision="64-true", max_epochs=1)
        for options in ({}, {"fused": False})
    ]
    assert [ways(module.trainer.optimizers[0]) for module in found] == [{True}, {False}]
    close(*found)
