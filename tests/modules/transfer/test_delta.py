"""DELTA: its term by hand, the attention and when it is computed, and that nothing of the run is disturbed by it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import transfer_contract as contract
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import framework.modules.transfer.delta as module_under_test
from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.modules import DELTA
from framework.networks import ResidualNetwork
from framework.trainer import Trainer

CASE = contract.Case("DELTA", DELTA, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any) -> Path:
    return contract.prepare(tmp_path_factory.mktemp("delta"), images)


def moved(monkeypatch: pytest.MonkeyPatch, **options: Any) -> DELTA:
    """A model in float64 in evaluation mode, away from its source network."""
    model = DELTA(3, **{"backbone": "resnet8", "bottleneck_features": 8, "attention": "none", **options})
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.double().eval()


def batch_of(size: int = 16) -> LabelledBatch:
    return LabelledBatch(torch.randn(4, 3, size, size, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))


def hidden(network: ResidualNetwork, images: Tensor) -> list[Tensor]:
    """The outputs of the first convolution and the three stages, layer by layer."""
    first = network.conv1(images)
    outputs = [network.maxpool(network.relu(network.bn1(first)))]
    for stage in (network.layer1, network.layer2, network.layer3):
        outputs.append(stage(outputs[-1]))
    # the convolution's ReLU may work in place: taken before
    return [network.conv1(images), *outputs[1:]]


def term_by_hand(model: DELTA, images: Tensor, attention: list[Tensor] | None = None) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    pairs = zip(hidden(model.backbone, images), hidden(model.source.module, images), strict=True)
    for index, (mine, theirs) in enumerate(pairs):
        n, channels, height, width = mine.shape
        for c in range(channels):
            weight = 1 / channels if attention is None else attention[index][c]
            squares = sum(((mine[i, c] - theirs[i, c].detach()) ** 2).sum() for i in range(n)) / n
            total = total + 0.5 * channels * weight * squares / (height * width)
    return total


def term(model: DELTA, batch: LabelledBatch) -> Tensor:
    with model.maps.recording(), model.source_maps.recording():
        return model.regularization(model.outputs(batch.images), batch)


@pytest.mark.parametrize("attended", [False, True])
def test_value_and_gradient_by_hand(attended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = moved(monkeypatch, attention="supervised" if attended else "none"), batch_of()
    attention = [torch.rand(width).softmax(0) for width in (16, 16, 32, 64)] if attended else None
    for layer, weights in zip(model.maps.layers, attention or [], strict=False):
        assert model.attention is not None
        model.attention[layer] = weights
    value, expected = term(model, batch), term_by_hand(model, batch.images, attention)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6 if attended else 1e-12)
    parameters = [parameter for name, parameter in model.backbone.named_parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_the_whole_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = moved(monkeypatch, trade_off=0.3, head_decay=0.7), batch_of()
    expected = torch.nn.functional.cross_entropy(model(batch.images), batch.labels) + 0.3 * term(model, batch)
    new = [*model.bottleneck.parameters(), *model.head.parameters()]
    expected = expected + 0.35 * sum((weight**2).sum() for weight in new)
    loss = model.training_step(batch, 0)
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(model.diagnostics["feature_distance"]) > 0
    gradient = torch.autograd.grad(loss, model.head.weight, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.head.weight, retain_graph=True)[0])


def test_sum_over_the_batch_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = moved(monkeypatch), batch_of()
    mean = term(model, batch)
    model.batch_reduction = "sum"
    torch.testing.assert_close(term(model, batch), 4 * mean)
    twice = LabelledBatch(batch.images.repeat(2, 1, 1, 1), batch.labels.repeat(2))
    torch.testing.assert_close(term(model, twice), 8 * mean)
    model.batch_reduction = "mean"
    torch.testing.assert_close(term(model, twice), mean)


@pytest.mark.parametrize(
    ("options", "size"), [(contract.SMALL_TRANSFORMER, 16), ({"backbone": "swin_t"}, 32)], ids=["vit", "swin_t"]
)
def test_transformers(options: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform attention is the mean over all axes: here of tokens and channels last."""
    model = moved(monkeypatch, **options, layers=2)
    batch = batch_of(size)
    with model.maps.recording(), model.source_maps.recording():
        outputs = model.outputs(batch.images)
        value = model.regularization(outputs, batch)
        expected = 0.0
        for layer in model.maps.layers:
            mine, theirs = model.maps[layer].detach(), model.source_maps[layer]
            expected += 0.5 * mine.shape[-1] * float(((mine - theirs) ** 2).mean())
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9)
    assert all(gradient is not None for gradient in torch.autograd.grad(value, [next(model.backbone.parameters())]))


def test_equal_networks_have_no_distance_and_the_source_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DELTA(3, backbone="resnet8", attention="none").eval()
    batch = LabelledBatch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    assert float(term(model, batch).detach()) == 0
    model.train()
    assert not any(part.training for part in model.source.modules())
    assert not any(parameter.requires_grad for parameter in model.source.parameters())


def test_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(monkeypatch).float()
    batch = LabelledBatch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    expected = term(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        value = term(model, batch)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0)  # the maps themselves are in bfloat16


def test_no_map_is_held_after_a_step_and_copies_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = moved(monkeypatch), batch_of()
    loss = model.training_step(batch, 0)
    assert loss is not None
    assert model.maps.caught == model.source_maps.caught == {}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.backbone))):
        assert other is not None
    other = copy.deepcopy(model)
    monkeypatch.setattr(other, "log", lambda *_, **__: None)
    assert torch.equal(other.training_step(batch, 0), loss)
    assert model.maps.caught == {}


def test_layers_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = moved(monkeypatch, layers=["layer1.0.conv2", "layer3.0.conv2"]), batch_of()
    inputs: dict[Any, Tensor] = {}
    for network in (model.backbone, model.source.module):
        network.layer3[0].conv2.register_forward_hook(lambda m, i, o: inputs.update({m: o}))
        network.layer1[0].conv2.register_forward_hook(lambda m, i, o: inputs.update({m: o}))
    value = term(model, batch)
    expected = 0.0
    for layer in model.maps.layers:
        mine, theirs = (inputs[network.get_submodule(layer)] for network in (model.backbone, model.source.module))
        expected += 0.5 * mine.shape[1] * float(((mine - theirs) ** 2).mean().detach())
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------- attention
def attention_of(model: Any) -> dict[str, Tensor]:
    return {layer: model.attention[layer].clone() for layer in model.maps.layers}


@pytest.mark.parametrize("kind", ["supervised", "first_order"])
def test_attention_of_a_run(kind: str, folder: Path) -> None:
    """Computed on the training images, a distribution over each layer's channels, and not a uniform one."""
    model = contract.fit(CASE, folder, model={"attention": kind, "attention_batches": 2}, max_epochs=1)
    weights = attention_of(model)
    assert {layer: len(values) for layer, values in weights.items()} == {
        "conv1": 16,
        "layer1": 16,
        "layer2": 32,
        "layer3": 64,
    }
    for values in weights.values():
        assert float(values.sum()) == pytest.approx(1)
        assert float(values.min()) > 0
        assert float(values.std()) > 0
    again = contract.fit(CASE, folder, model={"attention": kind, "attention_batches": 2}, max_epochs=1)
    assert not contract.differing(weights, attention_of(again))


def test_attention_disturbs_nothing(folder: Path) -> None:
    """Neither order, augmentation nor dropout of the batches that follow."""
    with_it = contract.fit(CASE, folder, model={"trade_off": 0.0})
    without = contract.fit(CASE, folder, model={"trade_off": 0.0, "attention": "none"})
    assert not contract.differing(contract.weights(with_it.backbone), contract.weights(without.backbone))
    assert not contract.differing(contract.weights(with_it.bottleneck), contract.weights(without.bottleneck))


def test_attention_is_computed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contract.fit(CASE, folder, save={7: tmp_path / "7.ckpt"})

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(module_under_test, "loss_increases", refuse)
    with pytest.raises(AssertionError):
        contract.fit(CASE, folder)
    resumed = contract.fit(CASE, folder, resume=tmp_path / "7.ckpt")
    assert not contract.differing(contract.weights(whole), contract.weights(resumed))
    loaded = DELTA.load_from_checkpoint(tmp_path / "7.ckpt", weights_only=True)
    assert not contract.differing(attention_of(whole), attention_of(loaded))
    source = torch.load(folder / "weights.pth", weights_only=True)
    assert all(torch.equal(value, source[name]) for name, value in loaded.source.module.state_dict().items())


def test_attention_finds_the_channel_that_tells_the_classes(folder: Path) -> None:
    """Of a norm all but one of whose channels are nearly off in the source network."""
    for kind in ("supervised", "first_order"):
        torch.manual_seed(0)
        model = contract.build_model(CASE, folder, layers=["layer3.0.bn2"], attention=kind, attention_temperature=1.0)
        assert isinstance(model, DELTA)
        with torch.no_grad():
            norm = model.source.module.layer3[0].bn2
            norm.weight.mul_(0.001)
            norm.bias.mul_(0)
            norm.weight[5] = 3.0
        # with some draws the estimate's sign is wrong for that channel: the loss is not linear
        Trainer(**contract.QUIET, max_epochs=1).fit(model, contract.build_data(folder, seed=1))
        assert int(attention_of(model)["layer3.0.bn2"].argmax()) == 5


def test_half_precision_throughout(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "bf16-true", "model": {"attention_batches": 1}}
    whole = contract.fit(CASE, folder, save={7: tmp_path / "7.ckpt"}, **options)
    resumed = contract.fit(CASE, folder, resume=tmp_path / "7.ckpt", **options)
    assert not contract.differing(attention_of(whole), attention_of(resumed))
    assert not contract.differing(contract.weights(whole), contract.weights(resumed))


def test_a_loader_without_a_datamodule_is_not_disturbed() -> None:
    """It shuffles by the default generator."""
    images, labels = torch.randn(20, 3, 16, 16), torch.arange(20) % 3
    seen: list[list[float]] = []
    for attention in ("supervised", "none"):
        torch.manual_seed(3)
        model = DELTA(3, backbone="resnet8", attention=attention, attention_batches=1)
        loader = DataLoader(TensorDataset(images, labels), 5, shuffle=True, collate_fn=collated)
        torch.manual_seed(4)
        batches = Seen()
        Trainer(**contract.QUIET, max_epochs=1, callbacks=batches).fit(model, loader)
        seen.append(batches.pixels)
    assert len(seen[0]) == 4
    assert seen[0] == seen[1]


def collated(samples: list[tuple[Tensor, Tensor]]) -> LabelledBatch:
    images, labels = zip(*samples, strict=True)
    return LabelledBatch(torch.stack(images), torch.stack(labels))


class Seen(L.Callback):
    """The first pixel of each training batch."""

    def __init__(self) -> None:
        self.pixels: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: LabelledBatch, index: int) -> None:
        self.pixels.append(float(batch.images[0, 0, 0, 0]))


def test_the_classifier_sees_what_the_epoch_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = module_under_test.train_linear_classifier

    def counted(features: Tensor, labels: Tensor, num_classes: int) -> Any:
        seen.append(len(features))
        return original(features, labels, num_classes)

    monkeypatch.setattr(module_under_test, "train_linear_classifier", counted)
    for options, images in (({}, 20), ({"limit_train_batches": 2}, 8), ({"limit_train_batches": 0.4}, 8)):
        model = contract.build_model(CASE, folder)
        Trainer(**{**contract.QUIET, "max_epochs": 1, **options}).fit(model, contract.build_data(folder))
        assert seen.pop() == images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "uniform"}, r"--model\.attention.*'uniform'"),
        ({"batch_reduction": "none"}, r"--model\.batch_reduction"),
        ({"attention_batches": 0}, r"--model\.attention_batches"),
        ({"attention_temperature": 0.0}, r"--model\.attention_temperature"),
        ({"head_decay": -1.0}, r"--model\.head_decay"),
        ({"trade_off": -1.0}, r"--model\.trade_off"),
        ({"layers": 9}, r"--model\.layers"),
        ({"layers": ["layer9"]}, r"--model\.layers.*layer9"),
    ],
)
def test_bad_values_name_the_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DELTA(3, backbone="resnet8", **options)
