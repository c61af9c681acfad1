"""The last spatial map of any backbone: which layer, where each patch is, and that the backbone stays as it is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.networks import convert_domain_specific, create_backbone, resnet8, select_domain
from framework.networks.spatial_maps import SpatialMaps

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
NETWORKS: list[tuple[str, dict[str, Any], str, tuple[int, int, int]]] = [  # layer; channels, stride, side at 64 pixels
    ("resnet8", {}, "layer3", (64, 4, 16)),
    ("resnet18", {}, "layer4", (512, 32, 2)),
    ("mobilenet_v3_small", {}, "features.12", (576, 32, 2)),
    ("timm/tf_efficientnet_lite0", {}, "bn2", (1280, 32, 2)),
    ("densenet121", {}, "features.norm5", (1024, 32, 2)),
    ("timm/vit_tiny_patch16_224", VIT, "norm", (32, 4, 4)),
    ("timm/vit_tiny_patch16_224", {**VIT, "reg_tokens": 4}, "norm", (32, 4, 4)),
    ("timm/vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}, "blocks.1", (32, 4, 4)),
    ("timm/deit_tiny_distilled_patch16_224", VIT, "norm", (32, 4, 4)),
    ("vit_b_16", {"image_size": 32}, "encoder.ln", (768, 16, 2)),
    ("timm/swin_tiny_patch4_window7_224", SWIN, "norm", (128, 32, 2)),
]


def map_of(backbone: nn.Module, maps: SpatialMaps, images: Tensor) -> Tensor:
    with maps.recording():
        backbone(images)
        return maps.last()


@pytest.mark.parametrize(("name", "options", "layer", "expected"), NETWORKS)
def test_layer_channels_and_stride(
    name: str, options: dict[str, Any], layer: str, expected: tuple[int, int, int]
) -> None:
    backbone = create_backbone(name, **options).eval()
    maps = SpatialMaps(backbone)
    channels, stride, side = expected
    assert (maps.layer, maps.channels, maps.stride) == (layer, channels, stride)
    images = torch.randn(2, 3, side * stride, side * stride)
    with torch.no_grad():
        assert map_of(backbone, maps, images).shape == (2, channels, side, side)


def test_tokens_lie_where_their_patches_do() -> None:
    """Against the backbone's own tokens, and by what a changed patch changes where tokens do not mix."""
    for extra in (0, 3):
        backbone = create_backbone("timm/vit_tiny_patch16_224", **VIT, reg_tokens=extra).eval()
        maps, images = SpatialMaps(backbone), torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            found = map_of(backbone, maps, images)
            tokens = backbone.forward_features(images)
            for row in range(4):
                for column in range(4):
                    assert torch.equal(found[:, :, row, column], tokens[:, 1 + extra + 4 * row + column])
            for block in backbone.blocks:
                block.attn.proj.weight.zero_()
            before = map_of(backbone, maps, images)
            changed = images.clone()
            changed[:, :, 4:8, 12:16] += 1  # patch (1, 3)
            difference = (map_of(backbone, maps, changed) != before).any(1)
        assert difference.nonzero().tolist() == [[0, 1, 3], [1, 1, 3]]


def test_tokens_of_torchvision() -> None:
    backbone = create_backbone("vit_b_16", image_size=32).eval()
    maps, images = SpatialMaps(backbone), torch.randn(1, 3, 32, 32)
    kept: list[Tensor] = []
    backbone.encoder.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        found = map_of(backbone, maps, images)
    for row in range(2):
        for column in range(2):
            assert torch.equal(found[:, :, row, column], kept[0][:, 1 + 2 * row + column])


def test_channels_last_maps_are_turned() -> None:
    backbone = create_backbone("timm/swin_tiny_patch4_window7_224", **SWIN).eval()
    images = torch.randn(1, 3, 64, 64)
    maps = SpatialMaps(backbone)
    with torch.no_grad():
        assert torch.equal(map_of(backbone, maps, images), backbone.forward_features(images).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["resnet8", "timm/vit_tiny_patch16_224", "mobilenet_v3_small"])
def test_the_backbone_stays_as_it_is(name: str) -> None:
    options: dict[str, Any] = {**VIT, "drop_rate": 0.5} if name.startswith("timm") else {}
    backbone = create_backbone(name, **options)
    list(backbone.modules())[3].eval()  # a mixture of modes
    modes = {key: module.training for key, module in backbone.named_modules()}
    state = copy.deepcopy(backbone.state_dict())
    generator = torch.get_rng_state()
    maps = SpatialMaps(backbone)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {key: module.training for key, module in backbone.named_modules()} == modes
    after = backbone.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    hooks = {key: len(module._forward_hooks) for key, module in backbone.named_modules() if module._forward_hooks}
    assert hooks == {maps.layer: 1}


def test_the_size_of_another_run_changes_nothing() -> None:
    """A checkpoint of small images names its size, and a decoder of the same shape must be built again."""
    backbone = create_backbone("resnet18")
    object.__setattr__(backbone, "preprocessing", backbone.preprocessing._replace(image_size=32))
    maps = SpatialMaps(backbone)
    assert (maps.layer, maps.stride) == ("layer4", 32)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_both_is_one_of_its_own(how: str) -> None:
    backbone = resnet8().eval()
    together = nn.ModuleDict({"backbone": backbone})
    together.maps = SpatialMaps(backbone)  # type: ignore[assignment]
    assert list(together.state_dict()) == [f"backbone.{key}" for key in backbone.state_dict()]
    other = copy.deepcopy(together) if how == "deepcopy" else pickle.loads(pickle.dumps(together))
    images = torch.randn(1, 3, 16, 16)
    expected = map_of(backbone, together.maps, images)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert torch.equal(map_of(other.backbone, other.maps, images), expected)
    with together.maps.recording():
        other.backbone(images)
        with pytest.raises(ConfigurationError, match="returned nothing"):
            together.maps.last()


def test_behind_domain_specific_batch_norm() -> None:
    """lite0's map is that of a batch norm itself."""
    backbone = convert_domain_specific(create_backbone("timm/tf_efficientnet_lite0"))
    maps = SpatialMaps(backbone)
    assert maps.layer == "bn2"
    backbone.bn2.source.weight.data.zero_()
    images = torch.randn(2, 3, 32, 32)
    select_domain(backbone, "source")
    assert map_of(backbone, maps, images).abs().max() == 0
    select_domain(backbone, "target")
    assert map_of(backbone, maps, images).abs().max() > 0


def test_compiled_afterwards() -> None:
    backbone = resnet8().eval()
    maps, images = SpatialMaps(backbone), torch.randn(2, 3, 16, 16)
    expected = map_of(backbone, maps, images)
    backbone.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(map_of(backbone, maps, images), expected)
    gradient = torch.autograd.grad(map_of(backbone, maps, images).sum(), backbone.conv1.weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), backbone.conv1.weight)[0])
    torch._dynamo.reset()


class Flat(nn.Module):
    """Pools before its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images.mean(dim=(2, 3))).relu())


class Early(nn.Module):
    """Has a map in its first stage alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.stem(images).mean(dim=(2, 3)))


@pytest.mark.parametrize("backbone", [Flat(), Early()])
def test_without_a_map(backbone: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match=rf"`--model\.backbone`.*{type(backbone).__name__} has none"):
        SpatialMaps(backbone)


def test_tokens_of_other_images_than_squares() -> None:
    backbone = create_backbone("timm/vit_tiny_patch16_224", **VIT, dynamic_img_size=True).eval()
    maps = SpatialMaps(backbone)
    assert map_of(backbone, maps, torch.randn(1, 3, 8, 8)).shape == (1, 32, 2, 2)
    with pytest.raises(ConfigurationError, match="square images, but got 8 patches"):
        map_of(backbone, maps, torch.randn(1, 3, 8, 16))
