"""Which networks are convolutional, and that the layout in memory changes no number."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision

from framework.networks import create_backbone, is_convolutional, keep_channels_last

CONVOLUTIONAL = (
    *("resnet8", "resnet110", "resnet18", "resnet152", "vgg11", "vgg16_bn", "alexnet", "densenet121", "squeezenet1_0"),
    *("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "maxvit_t"),
    *("shufflenet_v2_x0_5", "mnasnet0_5", "wide_resnet50_2", "resnext50_32x4d", "regnet_y_400mf"),
)
TRANSFORMERS = ("vit_b_16", "vit_b_32", "swin_t", "swin_v2_t")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONVOLUTIONAL, *TRANSFORMERS])
def test_of_torchvision(name: str) -> None:
    assert is_convolutional(create_backbone(name)) == (name in CONVOLUTIONAL)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_resnet", True),
        ("test_convnext", True),
        ("test_efficientnet", True),
        ("test_vit", False),
        ("mobilenetv3_small_050", True),
        ("swin_tiny_patch4_window7_224", False),
        ("deit_tiny_patch16_224", False),
        ("mixer_s32_224", False),
    ],
)
def test_of_timm(name: str, expected: bool) -> None:
    pytest.importorskip("timm")
    assert is_convolutional(create_backbone(f"timm/{name}")) is expected


def test_every_convolutional_classifier_of_torchvision_is_a_case() -> None:
    families = {name.split("_")[0].rstrip("0123456789") for name in (*CONVOLUTIONAL, *TRANSFORMERS)}
    known = {name.split("_")[0].rstrip("0123456789") for name in torchvision.models.list_models(torchvision.models)}
    assert known - families <= {"googlenet", "inception"}  # seconds to build; of convolutions but for the classifier


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet8", 32),
        ("resnet18", 48),
        pytest.param("vgg11", 32, marks=pytest.mark.slow),
        ("mobilenet_v3_small", 48),
        ("convnext_tiny", 32),
        ("squeezenet1_0", 48),
        ("timm/test_resnet", 48),
        ("timm/test_convnext", 64),
        ("timm/test_efficientnet", 48),
        ("timm/test_vit", 160),  # forced
    ],
)
def test_same_features_and_gradients(name: str, size: int) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    network = create_backbone(name).double().train()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Dropout) or type(layer).__name__ in ("StochasticDepth", "DropPath"):
            layer.eval()
    other = copy.deepcopy(network)
    keep_channels_last(other)
    assert other.state_dict().keys() == network.state_dict().keys()
    images, weights = torch.randn(4, 3, size, size, dtype=torch.float64), None
    strides = set()
    for one in (network, other):
        features = one(images)
        strides.add(features.stride())  # what comes next may view it
        weights = torch.randn_like(features) if weights is None else weights
        (features * weights).sum().backward()
    assert len(strides) == 1
    torch.testing.assert_close(other(images), network(images), rtol=1e-8, atol=1e-8)
    for (key, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), key
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-6, atol=1e-8 * float(one.grad.abs().max() + 1))


def test_the_layout_goes_through_the_whole_network() -> None:
    """No layer on the way turns the maps back, which would cost more than the layout saves."""
    network = create_backbone("resnet18")
    keep_channels_last(network)
    seen = []
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(
                lambda _, inputs, output: seen.extend(
                    tensor.is_contiguous(memory_format=torch.channels_last)
                    for tensor in (inputs[0], output)
                    if tensor.shape[1] > 3  # not the images
                )
            )
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert len(seen) == 39
    assert all(seen)
    assert all(
        parameter.grad.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
        for parameter in network.parameters()
        if parameter.dim() == 4
    )


def test_a_copy_keeps_the_layout() -> None:
    network = create_backbone("resnet8")
    keep_channels_last(network)
    other = copy.deepcopy(network)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in other.parameters() if p.dim() == 4)
    layouts = []
    other.conv1.register_forward_hook(  # type: ignore[union-attr]
        lambda _, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    other(torch.randn(2, 3, 16, 16))
    assert layouts == [True]
