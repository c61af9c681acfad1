"""Any backbone as a sequence of stages."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from framework.networks import Stage, create_backbone, resnet8, resnet50, split_stages

# one of each kind: plain and residual networks, with features in one child or many, transformers, lists of modules
TORCHVISION = {
    "alexnet": 6,
    "convnext_tiny": 8,
    "densenet121": 8,
    "efficientnet_b0": 9,
    "googlenet": 12,
    "inception_v3": 16,
    "maxvit_t": 6,
    "mnasnet0_5": 10,
    "mobilenet_v2": 19,
    "mobilenet_v3_small": 14,
    "resnet50": 5,
    "shufflenet_v2_x0_5": 5,
    "squeezenet1_1": 9,
    "swin_t": 8,
    "swin_v2_t": 8,
    "vgg16_bn": 14,
    "vit_b_32": 13,
}
TIMM = {
    "cait_xxs24_224": 27,  # its last two blocks are in a list of their own
    "convnextv2_atto": 5,
    "crossvit_tiny_240": 5,  # as are its patch embeddings
    "efficientvit_b0": 6,  # most of its parameters are in the head
    "eva02_tiny_patch14_224": 13,
    "levit_128s": 4,
    "mobilenetv4_conv_small": 7,
    "regnety_002": 5,
    "resnetv2_50": 5,
    "selecsls42": 8,
    "swin_tiny_patch4_window7_224": 5,
    "tf_efficientnet_lite0": 9,
    "tresnet_m": 5,
    "vit_small_patch8_224": 13,  # its position embedding has more numbers than the patch embedding
    "vit_tiny_patch16_224": 13,
    "volo_d1_224": 8,
    "xception41": 14,
}


def build(name: str) -> tuple[nn.Module, int]:
    """A backbone without memory, and the size of its images."""
    with torch.device("meta"):
        if name in TORCHVISION:
            return create_backbone(name), 299 if name == "inception_v3" else 224
        backbone = timm.create_model(name, num_classes=0)
        return backbone, timm.data.resolve_model_data_config(backbone)["input_size"][-1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [*TORCHVISION.items(), *TIMM.items()])
def test_stages_of_published_networks(name: str, count: int) -> None:
    backbone, size = build(name)
    stages = split_stages(backbone)
    assert len(stages) == count

    # every parameter once, and every running statistic with the modules
    parameters = [id(parameter) for stage in stages for parameter in stage.parameters]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == {id(parameter) for parameter in backbone.parameters()}
    covered = {id(buffer) for stage in stages for module in stage.modules for buffer in module.buffers()}
    assert all(id(b) in covered for key, b in backbone.named_buffers() if key.endswith(("running_mean", "running_var")))

    # named as in named_modules, none of them most of the network
    for stage in stages:
        assert any(backbone.get_submodule(stage.name) is module for module in stage.modules)
    total = sum(parameter.dim() > 1 for parameter in backbone.parameters())
    assert all(sum(parameter.dim() > 1 for parameter in stage.parameters) <= 0.9 * total for stage in stages)

    # in the order of the forward pass, each called by itself
    called: list[int] = []
    for index, stage in enumerate(stages):
        backbone.get_submodule(stage.name).register_forward_pre_hook(lambda *_, index=index: called.append(index))
    with torch.device("meta"):
        backbone.eval()(torch.empty(2, 3, size, size))
    assert list(dict.fromkeys(called)) == list(range(count))


def test_stages_of_the_packages_own_networks() -> None:
    for network, names in (
        (resnet8(), ["layer1", "layer2", "layer3"]),
        (resnet50(), [f"layer{i}" for i in range(1, 5)]),
    ):
        stages = split_stages(network)
        assert [stage.name for stage in stages] == ["conv1", *names]
        assert stages[0].modules == (network.conv1, network.bn1)
        assert [stage.modules for stage in stages[1:]] == [(network.get_submodule(name),) for name in names]
    network = resnet8(block="preactivation")
    assert split_stages(network)[-1].modules == (network.layer3, network.last_bn)


def test_tokens_and_embeddings_are_with_what_follows() -> None:
    backbone = create_backbone("vit_b_32")
    stages = split_stages(backbone)
    assert stages[0].name == "conv_proj"
    assert any(parameter is backbone.class_token for parameter in stages[0].parameters)
    assert any(parameter is backbone.encoder.pos_embedding for parameter in stages[1].parameters)
    assert stages[-1].modules == (backbone.encoder.layers.encoder_layer_11, backbone.encoder.ln)


class Scales(nn.Module):
    """Vectors only, first and last, and a batch norm without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.body = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(5)], nn.BatchNorm2d(3, affine=False), nn.ReLU())
        self.last = nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.ones(3, 3))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(self.first(images)).mean((2, 3))
        return self.last(features) @ self.gain


def test_vectors_and_statistics_are_in_a_stage_too() -> None:
    network = Scales()
    stages = split_stages(network)
    assert [stage.name for stage in stages] == [f"body.{i}" for i in range(5)]
    # the gain is registered in the network itself, so with its first stage
    assert {id(p) for p in stages[0].parameters} == {
        id(p) for part in (network.first, network.body[0]) for p in part.parameters()
    } | {id(network.gain)}
    assert stages[0].modules == (network.first, network.body[0])
    assert stages[-1].modules == (network.body[4], network.body[5], network.last)


def test_a_shared_parameter_is_in_its_first_stage() -> None:
    network = nn.Sequential(*[nn.Linear(3, 3) for _ in range(5)])
    network[3].weight = network[1].weight
    stages = split_stages(network)
    assert [len(stage.parameters) for stage in stages] == [2, 2, 2, 1, 2]
    assert stages[1].parameters[0] is network[1].weight


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (nn.Flatten(), []),
        (nn.ParameterDict({"gain": torch.ones(3)}), ["gain"]),
        (nn.BatchNorm2d(3), ["weight"]),
        (nn.Linear(3, 3), ["weight"]),
        (nn.Sequential(nn.Sequential(nn.Linear(3, 3))), ["0.0"]),
    ],
    ids=str,
)
def test_hardly_anything_to_split(network: nn.Module, names: list[str]) -> None:
    stages = split_stages(network)
    assert [stage.name for stage in stages] == names
    assert [id(p) for stage in stages for p in stage.parameters] == [id(p) for p in network.parameters()]


def test_the_split_does_not_depend_on_what_is_frozen_or_copied() -> None:
    network = resnet8()

    def described(stages: list[Stage]) -> list[tuple[str, int, int]]:
        return [(stage.name, len(stage.modules), len(stage.parameters)) for stage in stages]

    expected = described(split_stages(network))
    assert described(split_stages(copy.deepcopy(network).requires_grad_(False).eval())) == expected
