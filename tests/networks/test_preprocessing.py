"""What each backbone expects of its images, and sizes that it does not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.networks import create_backbone
from framework.networks.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, check_image_size
from framework.networks.torchvision_backbones import torchvision_preprocessing

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet8", Preprocessing(32, IMAGENET_MEAN, IMAGENET_STD)),
        ("resnet110", Preprocessing(32, IMAGENET_MEAN, IMAGENET_STD)),
        ("resnet18", Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD)),
        ("resnet152", Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD)),
        ("squeezenet1_1", Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD)),
        ("efficientnet_b1", Preprocessing(240, IMAGENET_MEAN, IMAGENET_STD)),
    ],
)
def test_of_a_network_without_weights(name: str, expected: Preprocessing) -> None:
    with torch.device("meta"):
        assert create_backbone(name).preprocessing == expected


def test_of_a_vision_transformer_built_for_a_size() -> None:
    """It takes that one alone; the default weights of the largest are for 518 pixels, the network is not."""
    with torch.device("meta"):
        assert create_backbone("vit_b_32", image_size=64).preprocessing.image_size == 64
        assert create_backbone("vit_h_14").preprocessing.image_size == 224
    assert torchvision_preprocessing("vit_h_14").image_size == 518


def test_of_published_weights() -> None:
    assert torchvision_preprocessing("efficientnet_v2_l") == Preprocessing(480, HALF, HALF)
    assert torchvision_preprocessing("regnet_y_16gf", "IMAGENET1K_SWAG_E2E_V1").image_size == 384
    assert torchvision_preprocessing("regnet_y_16gf", "IMAGENET1K_V1").image_size == 224
    assert torchvision_preprocessing("inception_v3").image_size == 299
    for name in torchvision.models.list_models(module=torchvision.models):
        assert torchvision_preprocessing(name).image_size >= 224


def test_weights_say_what_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network with two sets of weights."""
    state = torchvision.models.regnet_y_400mf().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    sizes = {"IMAGENET1K_V1": 96, "IMAGENET1K_V2": 88, "DEFAULT": 80}
    monkeypatch.setattr(
        "framework.networks.torchvision_backbones.torchvision_preprocessing",
        lambda name, weights="DEFAULT": Preprocessing(sizes[weights]),
    )
    assert create_backbone("regnet_y_400mf", "IMAGENET1K_V1").preprocessing.image_size == 96
    assert create_backbone("regnet_y_400mf", "IMAGENET1K_V2").preprocessing.image_size == 88
    assert create_backbone("regnet_y_400mf", "DEFAULT").preprocessing.image_size == 80
    assert create_backbone("regnet_y_400mf").preprocessing.image_size == 80  # of the default weights


# ---------------------------------------------------------------------- sizes


class Small(torchvision.models.VisionTransformer):
    """A vision transformer of 32 pixels, as torchvision's are."""

    def __init__(self, image_size: int = 32, num_features: int = 8) -> None:
        super().__init__(image_size, 8, 1, 2, 8, 16)
        self.heads = nn.Identity()
        self.num_features = num_features
        self.preprocessing = Preprocessing(image_size)


def test_a_size_that_the_network_does_not_take() -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_image_size(Small(), "vit", 40)
    message = str(caught.value)
    assert "`--data.image_size` to be a size that 'vit' takes, such as the 32 pixels" in message
    assert "got 40: Wrong image height! Expected 32 but got 40. Leave" in message
    assert "`--model.backbone_options '{image_size: 40}'`" in message
    check_image_size(Small(40), "vit", 40)
    check_image_size(Small(), "vit", 32)


def test_images_too_small_for_a_network() -> None:
    with pytest.raises(ConfigurationError, match=r"`--data.image_size` .* 224 pixels .* got 8: .*Leave it out\.$"):
        check_image_size(create_backbone("alexnet"), "alexnet", 8)


def test_what_is_not_the_sizes_fault() -> None:
    grey = create_backbone("resnet8", in_channels=1)
    with pytest.raises(ConfigurationError, match=r"`--model.backbone` and its options .* \[N, 3, 32, 32\]"):
        check_image_size(grey, "resnet8", 16)
    with pytest.raises(ConfigurationError, match=r"to return features \[1, 9\] of an image of 32 pixels.* \[1, 8\]"):
        check_image_size(Small(num_features=9), "vit", 32)


class Noisy(nn.Module):
    """Draws random numbers in both modes, and remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4).eval()
        self.dropout = nn.Dropout()
        self.num_features = 4
        self.training_seen: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.training_seen.append(self.training)
        return self.dropout(self.norm(self.layer(images)) + torch.rand(1)).mean((2, 3))


def test_the_probe_leaves_no_trace() -> None:
    for network in (create_backbone("resnet8").train(), Noisy().train()):
        state = {key: value.clone() for key, value in network.state_dict().items()}
        modes = [module.training for module in network.modules()]
        generator = torch.get_rng_state()
        check_image_size(network, "it", 16)
        assert [module.training for module in network.modules()] == modes
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(parameter.grad is None for parameter in network.parameters())
        if isinstance(network, Noisy):
            assert network.training_seen == [False]
    broken: Any = Small().train()
    with pytest.raises(ConfigurationError):
        check_image_size(broken, "vit", 40)
    assert broken.training
    assert broken.encoder.dropout.training


def test_a_network_on_the_meta_device_is_not_probed() -> None:
    with torch.device("meta"):
        check_image_size(Small(), "vit", 40)
