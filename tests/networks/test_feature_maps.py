"""Catching the outputs of inner layers: which ones, when, and that nothing stays behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from framework.errors import ConfigurationError
from framework.networks import FeatureMaps, create_backbone, resnet8
from framework.networks.feature_maps import channel_dimension, layer_names

IMAGES = torch.randn(2, 3, 16, 16)


def test_outputs_are_caught_inside_the_context_alone() -> None:
    network = resnet8().eval()
    maps = FeatureMaps(network, ["layer1", "layer3"])
    network(IMAGES)
    assert maps.caught == {}
    with maps.recording():
        network(IMAGES)
        hidden = network.layer1(network.relu(network.bn1(network.conv1(IMAGES))))
        assert torch.equal(maps["layer1"], hidden)
        assert list(maps.caught) == ["layer1", "layer3"]
    assert maps.caught == {}
    network.layer3 = nn.Linear(1, 1)
    with pytest.raises(RuntimeError), maps.recording():
        network(IMAGES)  # fails after the first layer's output is caught
    assert maps.caught == {}
    assert not maps.active


def test_a_layer_that_does_not_run_is_named() -> None:
    maps = FeatureMaps(resnet8(), ["layer1"])
    with maps.recording(), pytest.raises(ConfigurationError, match=r"`--model\.layers`.*'layer1' has returned nothing"):
        maps["layer1"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_hooks_of_its_own(how: str) -> None:
    network = resnet8().eval()
    maps = FeatureMaps(network, ["layer2"])
    together = nn.ModuleDict({"network": network})
    together.maps = maps
    other = copy.deepcopy(together) if how == "deepcopy" else pickle.loads(pickle.dumps(together))
    with maps.recording():
        other.network(IMAGES)
        assert maps.caught == {}
    with other.maps.recording():
        other.network(IMAGES)
        assert list(other.maps.caught) == ["layer2"]


def test_compiled_with_and_without_recording() -> None:
    network = resnet8().eval()
    maps = FeatureMaps(network, ["layer1", "layer3"])
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with maps.recording():
        network(IMAGES)
        expected = {layer: maps[layer] for layer in maps.layers}
    for _ in range(2):
        with maps.recording():
            features = compiled(IMAGES)
            for layer in maps.layers:
                torch.testing.assert_close(maps[layer], expected[layer])
            gradients = torch.autograd.grad(maps["layer1"].sum(), network.conv1.weight)[0]
        torch.testing.assert_close(compiled(IMAGES), features)
        assert maps.caught == {}
        theirs = torch.autograd.grad(expected["layer1"].sum(), network.conv1.weight, retain_graph=True)[0]
        torch.testing.assert_close(gradients, theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", ["layer1", "layer2", "layer3", "layer4"]),
        ("convnext_tiny", ["features.4", "features.5", "features.6", "features.7"]),
        ("swin_t", ["features.4", "features.5", "features.6", "features.7"]),
    ],
)
def test_the_last_stages_of_backbones(name: str, expected: list[str]) -> None:
    with torch.device("meta"):
        assert layer_names(create_backbone(name), 4) == expected


def test_layers_that_are_not_there() -> None:
    network = resnet8()
    assert layer_names(network, ["layer1.0.conv2", "layer3"]) == ["layer1.0.conv2", "layer3"]
    for layers, message in [
        (0, r"from 1 to 4.*but got 0"),
        (5, r"from 1 to 4.*but got 5"),
        (["layer9"], r"'layer9'\. Did you mean"),
        ([], r"different modules, but got \[\]"),
        (["layer1", "layer1"], "different modules"),
    ]:
        with pytest.raises(ConfigurationError, match=r"`--model\.layers`.*" + message):
            layer_names(network, layers)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [("resnet8", 16, {}), ("densenet121", 32, {}), ("swin_t", 32, {}), ("vit_b_16", 32, {"image_size": 32})],
)
def test_channels_of_real_networks(name: str, size: int, options: dict[str, int]) -> None:
    """As many as the next layer takes: here the last map of each network, whose channels are the features'."""
    network = create_backbone(name, **options).eval()
    layers = layer_names(network, 1)
    maps = FeatureMaps(network, layers)
    with maps.recording(), torch.no_grad():
        network(torch.randn(2, 3, size, size))
        module = network.get_submodule(layers[0])
        assert maps[layers[0]].shape[channel_dimension(module, maps[layers[0]])] == network.num_features


def test_channels_by_shape() -> None:
    convolution, linear = nn.Conv2d(1, 1, 1), nn.Linear(1, 1)
    for module, shape, expected in [
        (convolution, (2, 8), 1),
        (linear, (2, 7, 8), 2),
        (linear, (2, 8, 5, 5), 1),
        (convolution, (2, 5, 5, 8), 3),
        (convolution, (2, 5, 5, 5), 1),
        (linear, (2, 5, 5, 5), 3),
        (convolution, (2, 8, 5, 6), 1),
        (linear, (2, 5, 6, 8), 3),
    ]:
        assert channel_dimension(module, torch.zeros(shape)) == expected, (module, shape)
    for output in (torch.zeros(3), torch.zeros(1, 1, 1, 1, 1), (torch.zeros(3, 3),)):
        with pytest.raises(ConfigurationError, match=r"`--model\.layers`.*Linear returns a t"):
            channel_dimension(linear, output)
