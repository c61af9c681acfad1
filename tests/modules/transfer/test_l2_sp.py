"""L2-SP: its two terms and their gradients, the starting point in the checkpoint, what a strong pull does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transfer_contract as contract
from torch import Tensor

from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.modules import L2SP
from framework.networks import NetworkOutputs

PLAIN = {"momentum": 0.0, "nesterov": False}
CASE = contract.Case("L2SP", L2SP, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any) -> Path:
    return contract.prepare(tmp_path_factory.mktemp("l2_sp"), images)


def moved(**options: Any) -> tuple[L2SP, dict[str, Tensor]]:
    """A model in float64 away from its starting point, and that point."""
    model = L2SP(3, **{"backbone": "resnet8", "bottleneck_features": 8, **options}).double()
    start = {name: value.detach().clone() for name, value in model.backbone.named_parameters()}
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, start


def loss_of(model: L2SP, batch: LabelledBatch, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    loss = model.training_step(batch, 0)
    assert loss is not None
    return loss


def batch_of(size: int = 16) -> LabelledBatch:
    return LabelledBatch(torch.randn(4, 3, size, size, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("options", [{}, contract.SMALL_TRANSFORMER], ids=["resnet8", "vit"])
def test_the_whole_loss_and_its_gradient(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, start = moved(**options, trade_off=0.3, head_decay=0.7)
    model.eval()  # batch statistics would change between the two forwards
    batch = batch_of()
    plain = torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
    new = {**dict(model.bottleneck.named_parameters(prefix="bottleneck")), **dict(model.head.named_parameters())}
    pulls = {name: parameter.detach() - start[name] for name, parameter in model.backbone.named_parameters()}
    expected = plain.item() + 0.15 * sum(float((pull * pull).sum()) for pull in pulls.values())
    expected += 0.35 * sum(float((weight.detach() ** 2).sum()) for weight in new.values())
    loss = loss_of(model, batch, monkeypatch)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    parameters = [*model.backbone.parameters(), *new.values()]
    before = torch.autograd.grad(plain, parameters, allow_unused=True)
    terms = [*(0.3 * pull for pull in pulls.values()), *(0.7 * weight.detach() for weight in new.values())]
    for mine, theirs, term in zip(torch.autograd.grad(loss, parameters), before, terms, strict=True):
        torch.testing.assert_close(mine, term if theirs is None else theirs + term)


def test_diagnostics(monkeypatch: pytest.MonkeyPatch) -> None:
    model, start = moved()
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(model._means, "add", logged.update)
    loss_of(model, batch_of(), monkeypatch)
    squares = sum(float(((p.detach() - start[name]) ** 2).sum()) for name, p in model.backbone.named_parameters())
    assert float(logged["train/distance"]) == pytest.approx(squares**0.5, rel=1e-12)
    assert float(logged["train/regularization"]) == pytest.approx(squares / 2, rel=1e-12)
    new = [*model.bottleneck.parameters(), *model.head.parameters()]
    assert float(logged["train/head_regularization"]) == pytest.approx(
        sum(float((weight.detach() ** 2).sum()) for weight in new) / 2
    )


def test_weight_matrices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, start = moved(vectors=False, trade_off=0.5, head_decay=0.5)
    kept = {name.replace("/", ".") for name in model.starting_point.state_dict()}
    assert kept == {name for name, value in start.items() if value.dim() > 1}
    loss = loss_of(model, batch_of(), monkeypatch)
    vectors = [model.backbone.bn1.weight, model.head.bias]
    without = loss_of(model.train(), batch_of(), monkeypatch)
    with torch.no_grad():
        half = model.regularization(NetworkOutputs(loss, loss), batch_of())
        for vector in vectors:
            vector.mul_(100)
        assert torch.equal(model.regularization(NetworkOutputs(without, without), batch_of()), half)


def test_statistics_are_no_weights_and_frozen_parts_none_that_move() -> None:
    model = L2SP(3, backbone="resnet8")
    names = {name.replace("/", ".") for name in model.starting_point.state_dict()}
    assert names == {name for name, _ in model.backbone.named_parameters()}
    assert not any("running" in name for name in names)
    model.backbone.requires_grad_(False)
    assert not model.regularization(NetworkOutputs(torch.zeros(1), torch.zeros(1)), batch_of()).requires_grad


def test_it_is_in_place_of_the_optimizers_weight_decay() -> None:
    assert L2SP(3, backbone="resnet8").optimizer_arguments["weight_decay"] == 0
    assert L2SP(3, backbone="resnet8", weight_decay=0.25).optimizer_arguments["weight_decay"] == 0.25


def test_the_starting_point_stays_and_travels(folder: Path, tmp_path: Path) -> None:
    start = contract.build_model(CASE, folder)
    model = contract.fit(CASE, folder, save={3: tmp_path / "3.ckpt"}, max_epochs=1)
    assert isinstance(model, L2SP)
    loaded = torch.load(folder / "weights.pth", weights_only=True)
    for name, anchor in model.starting_point.state_dict().items():
        assert torch.equal(anchor, loaded[name.replace("/", ".")])
    assert float(model.diagnostics["distance"]) > 0
    again = L2SP.load_from_checkpoint(tmp_path / "3.ckpt", weights_only=True)  # its backbone was built at random
    assert not contract.differing(
        contract.weights(again.starting_point),
        contract.weights(start.starting_point),
    )


def test_a_strong_pull_keeps_the_backbone_where_it_was(folder: Path) -> None:
    distances = []
    for trade_off in (0.0, 30.0):
        options = {"trade_off": trade_off, "learning_rate": 0.02, "optimizer_options": PLAIN}
        model = contract.fit(CASE, folder, model=options)
        distances.append(float(model.diagnostics["distance"]))
    assert distances[0] > 2 * distances[1] > 0


def test_full_precision_under_autocast() -> None:
    model = L2SP(3, backbone="resnet8")
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.01)
    outputs = NetworkOutputs(torch.zeros(1), torch.zeros(1))
    expected = model.regularization(outputs, batch_of())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.regularization(outputs, batch_of()), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("option", ["trade_off", "head_decay"])
def test_bad_values_name_the_flag(option: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"--model\.{option}"):
        L2SP(3, backbone="resnet8", **{option: -1.0})
