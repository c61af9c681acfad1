"""Gradient checkpointing changes no number, keeps less, and finds the blocks of any backbone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.networks import (
    FeatureMaps,
    checkpoint_blocks,
    convert_domain_specific,
    convert_stochastic,
    create_backbone,
    resnet8,
    select_domain,
)
from framework.networks.batch_norm import own_statistics, running_statistics_kept

BACKBONES = {  # size of an image, number and kind of the blocks
    "resnet20": (16, 9, "BasicBlock"),
    "resnet50": (32, 16, "BottleneckBlock"),
    "mobilenet_v2": (32, 17, "InvertedResidual"),
    "mobilenet_v3_small": (32, 11, "InvertedResidual"),
    "efficientnet_b0": (32, 16, "MBConv"),
    "densenet121": (32, 4, "_DenseBlock"),
    "convnext_tiny": (32, 18, "CNBlock"),
    "swin_t": (32, 12, "SwinTransformerBlock"),
    "vit_b_32": (224, 12, "EncoderBlock"),
    "regnet_y_400mf": (32, 16, "ResBottleneckBlock"),
    "timm/test_convnext": (64, 8, "ConvNeXtBlock"),
    "timm/test_vit": (160, 6, "Block"),
    "timm/swin_tiny_patch4_window7_224": (224, 12, "SwinTransformerBlock"),
}


def kept(network: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    """Features, and the bytes that the graph keeps besides parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = network(images)
    return features, sum(sizes.values())


def same(one: nn.Module, two: nn.Module) -> None:
    """Bit for bit: gradients, running statistics, and names."""
    for (key, parameter), other in zip(one.named_parameters(), two.parameters(), strict=True):
        if parameter.grad is None:
            assert other.grad is None, key
        else:
            assert torch.equal(parameter.grad, other.grad), key  # type: ignore[arg-type]
    assert list(one.state_dict()) == list(two.state_dict())
    for (key, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if BACKBONES[name][0] == 224 else name for name in BACKBONES]
)
def test_any_backbone(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    size, count, kind = BACKBONES[name]
    network = create_backbone(name).double().train()
    other = copy.deepcopy(network)
    blocks = checkpoint_blocks(other)
    assert [type(block).__name__ for block in blocks].count(kind) == count
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    results = []
    for one in (network, other):
        torch.manual_seed(1)  # dropout and stochastic depth
        features, size_kept = kept(one, images)
        features.square().mean().backward()
        results.append((features, size_kept))
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][1] < 0.6 * results[0][1]
    same(network, other)


@pytest.mark.parametrize("name", ["vgg11", "alexnet"])
def test_backbones_of_single_layers_are_refused(name: str) -> None:
    network = create_backbone(name)
    with pytest.raises(ConfigurationError, match=r"`--model.gradient_checkpointing` to be false for a"):
        checkpoint_blocks(network)
    assert not any("forward" in vars(module) for module in network.modules())


def pair(convert: Callable[[nn.Module], nn.Module] = lambda network: network) -> tuple[nn.Module, nn.Module]:
    """A small network with stochastic depth, without and with checkpoints; what converts it comes after these."""
    plain = resnet8(stochastic_depth=0.5).double()
    other = copy.deepcopy(plain)
    checkpoint_blocks(other)
    return convert(plain), convert(other)


def images(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=generator)


def test_running_statistics_are_updated_once() -> None:
    plain, other = pair()
    for step in range(3):
        for network in (plain, other):
            torch.manual_seed(step)
            network(images(step)).square().sum().backward()
    assert int(other.layer1[0].bn1.num_batches_tracked) == 3  # type: ignore[index,union-attr]
    same(plain, other)


def test_each_domains_norms_also_where_both_passes_come_first() -> None:
    networks = pair(convert_domain_specific)
    for network in networks:
        torch.manual_seed(0)
        for parameter in network.parameters():  # the domains' norms start alike
            parameter.data += 0.1 * torch.randn_like(parameter)
        loss: Tensor = torch.zeros((), dtype=torch.float64)
        for domain in ("source", "target"):
            select_domain(network, domain)  # type: ignore[arg-type]
            loss = loss + network(images(len(domain))).square().sum()
        select_domain(network, "target")
        loss.backward()
        select_domain(network, "source")
    same(*networks)
    assert all(module.domain == "source" for module in networks[1].modules() if hasattr(module, "domain"))


def test_stochastic_norm_reads_its_statistics_as_they_were() -> None:
    networks = pair(lambda network: convert_stochastic(network, 0.5))
    for network in networks:
        torch.manual_seed(0)
        first = network(images(0)).square().sum()
        (first + network(images(1)).square().sum()).backward()
    same(*networks)


@pytest.mark.parametrize("context", [running_statistics_kept, own_statistics])
def test_contexts_that_end_before_the_gradient(context: Callable[[nn.Module], object]) -> None:
    networks = pair()
    for network in networks:
        network.train(context is running_statistics_kept)
        torch.manual_seed(0)
        with context(network):  # type: ignore[attr-defined]
            loss = network(images()).square().sum()
        loss.backward()
        assert all(module.track_running_stats for module in network.modules() if hasattr(module, "running_mean"))
    same(*networks)


def test_frozen_norms_and_modes_that_change_before_the_gradient() -> None:
    """Without checkpoints the first pass's gradient must come at once: torch would take the statistics of later."""
    for_at_once, for_both = pair()
    for network in (for_at_once, for_both):
        network.eval()
        loss = network(images(0)).square().sum()
        if network is for_at_once:
            loss.backward()
            loss = loss.detach()
        network.train()
        torch.manual_seed(0)
        loss = loss + network(images(1)).square().sum()
        network.eval()
        loss.backward()
        assert not any(module.training for module in network.modules())
    assert all(torch.equal(*values) for values in zip(for_at_once.buffers(), for_both.buffers(), strict=True))
    stem = ("conv1", "bn1")  # has no checkpoint
    for (key, one), two in zip(for_at_once.named_parameters(), for_both.parameters(), strict=True):
        if key.split(".")[0] not in stem:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-9)


def test_without_gradient_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = pair()
    monkeypatch.setattr("framework.networks.checkpointing.checkpoint", None)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images()), other.eval()(images()))


def test_copies_have_blocks_of_their_own() -> None:
    _, other = pair()
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        for block in twin.modules():
            assert not hasattr(block.forward, "module") or block.forward.module is block
        twin(images()).sum().backward()
        assert all(parameter.grad is not None for parameter in twin.parameters())
        assert all(parameter.grad is None for parameter in other.parameters())


def test_caught_feature_maps_have_gradients() -> None:
    plain, other = pair()
    for network in (plain, other):
        maps = FeatureMaps(network, ["layer1", "layer2.0.conv2"])
        torch.manual_seed(0)
        with maps.recording():
            loss = network(images()).square().sum()
            loss = loss + maps["layer1"].square().sum() + maps["layer2.0.conv2"].square().sum()
        loss.backward()
    same(plain, other)


def test_under_autocast() -> None:
    plain, other = (network.float() for network in pair())
    for network in (plain, other):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(images().float()).float().square().sum()
        loss.backward()
    same(plain, other)


@pytest.mark.parametrize("convert", [lambda network: network, convert_domain_specific], ids=["plain", "specific"])
def test_compiled(convert: Callable[[nn.Module], nn.Module]) -> None:
    """One graph; the statistics are updated once there, too."""
    torch._dynamo.reset()
    networks = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        network = resnet8().double()
        if checkpointed:
            checkpoint_blocks(network)
        network = convert(network)
        if checkpointed:
            network.compile(backend="aot_eager", fullgraph=True)
        for step in range(2):
            network(images(step)).square().sum().backward()
        networks.append(network)
    for one, two in zip(*(network.state_dict().values() for network in networks), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    for one, two in zip(*(network.parameters() for network in networks), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-7, atol=1e-7)
    torch._dynamo.reset()


def test_a_block_that_changes_its_input_is_refused() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.layers(inputs.add_(1.0))
            return result

    network = nn.Sequential(nn.Linear(4, 4), *(Careless() for _ in range(4)))
    assert len(checkpoint_blocks(network)) == 4
    with pytest.raises(ConfigurationError, match="changes the input of a block in place"):
        network(torch.randn(2, 4)).sum().backward()
