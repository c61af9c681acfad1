"""timm's models through the door."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from framework.errors import ConfigurationError
from framework.networks import create_backbone, list_backbones, list_timm_backbones
from framework.networks.preprocessing import Preprocessing, check_image_size

timm = pytest.importorskip("timm")

HALF = (0.5, 0.5, 0.5)
SMALL = [  # name, width of the features, whether the classifier is one linear layer, its size
    ("test_resnet", 96, True, 64),
    ("test_efficientnet", 256, True, 64),
    ("test_convnext", 64, True, 64),
    ("test_vit", 64, True, 160),
    ("test_nfnet", 192, True, 64),
    ("lcnet_035", 1280, True, 64),  # wider behind the pooling than before
    ("resnetv2_18", 512, True, 64),  # its classifier is a convolution of the pooled features
    ("levit_128s", 384, False, 224),  # two heads, each with a batch norm
    ("tiny_vit_5m_224", 320, True, 224),
    ("deit_tiny_distilled_patch16_224", 192, False, 224),  # two heads
]


def build(name: str, **options: Any) -> nn.Module:
    network: nn.Module = timm.create_model(name, pretrained=False, **options).eval()
    return network


@pytest.mark.parametrize(("name", "num_features", "linear", "size"), SMALL)
def test_pooled_features_and_the_classifier_behind_them(
    tmp_path: Path, name: str, num_features: int, linear: bool, size: int
) -> None:
    whole = build(name, num_classes=6)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone: Any = create_backbone(f"timm/{name}", str(tmp_path / "weights.pth")).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = backbone(images)
        logits = whole(images)
    assert features.shape == (2, num_features)
    assert backbone.num_features == num_features
    source = backbone.source_classifier
    assert (source is not None) == linear
    if linear:
        torch.testing.assert_close(features @ source["weight"].T + source["bias"], logits, rtol=1e-4, atol=1e-5)
    plain = create_backbone(f"timm/{name}")
    assert (
        plain.state_dict().keys() == backbone.state_dict().keys()
    )  # a checkpoint is restored into one without weights
    assert plain.source_classifier is None


@pytest.mark.slow
def test_one_model_of_each_of_timms_files() -> None:
    """On the meta device: features of the announced width, and nothing but the classifier is left out."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.models._registry._model_to_module[name], []).append(name)
    assert len(families) > 80
    for names in families.values():
        name = sorted(
            names, key=lambda n: (not any(part in n for part in ("tiny", "small", "nano", "_s", "18")), len(n))
        )[0]
        with torch.device("meta"):
            backbone: Any = create_backbone(f"timm/{name}").eval()
            features = backbone(torch.empty(2, *timm.data.resolve_model_data_config(backbone)["input_size"]))
        assert features.shape == (2, backbone.num_features), name


def test_names() -> None:
    names = list_timm_backbones()
    assert {"timm/resnet50", "timm/convnextv2_tiny", "timm/tf_efficientnet_lite0"} <= set(names)
    assert len(names) == len(timm.list_models())
    assert list_timm_backbones("test_vit2") == ["timm/test_vit2"]
    assert not any(name.startswith("timm/") for name in list_backbones())
    with pytest.raises(
        ConfigurationError, match=r"a model of timm, but got 'timm/test_vitt'. Did you mean 'timm/test_v"
    ):
        create_backbone("timm/test_vitt")
    with pytest.raises(
        ConfigurationError, match=r"tag .*'test_vit', but got 'in22k'. Did you mean .*test_vit.r160_in1k"
    ):
        create_backbone("timm/test_vit.in22k")
    with pytest.raises(ConfigurationError, match=r"got 'convnextv2_tiny'. Did you mean 'timm/convnextv2_tiny'"):
        create_backbone("convnextv2_tiny")
    assert create_backbone("timm/test_vit.r160_in1k").num_features == 64


def test_what_they_expect() -> None:
    def of(name: str, **options: Any) -> Preprocessing:
        return create_backbone(f"timm/{name}", **options).preprocessing  # type: ignore[return-value]

    assert of("test_vit") == Preprocessing(160, HALF, HALF)
    assert of("test_vit", img_size=96) == Preprocessing(96, HALF, HALF)
    assert of("test_efficientnet") == Preprocessing(160)
    assert of("tf_efficientnet_lite0") == Preprocessing(224, HALF, HALF)


def test_options() -> None:
    backbone: Any = create_backbone("timm/test_vit", img_size=96, drop_path_rate=0.3)
    assert backbone(torch.zeros(1, 3, 96, 96)).shape == (1, 64)
    assert backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    unknown = (
        r"`--model.backbone_options` that 'timm/test_vit' takes \(.*img_size.*\), but got \{'colour': 1\}.*'colour'"
    )
    with pytest.raises(ConfigurationError, match=unknown):
        create_backbone("timm/test_vit", colour=1)
    for option, value in (("num_classes", 3), ("pretrained", True), ("features_only", True), ("global_pool", "")):
        with pytest.raises(ConfigurationError, match=rf"'timm/test_vit' a network of pooled .*{option}={value!r}"):
            create_backbone("timm/test_vit", **{option: value})


def test_a_size_that_it_does_not_take() -> None:
    with pytest.raises(ConfigurationError, match=r"`--data.image_size` .*160 pixels.*96.*'\{img_size: 96\}'"):
        check_image_size(create_backbone("timm/test_vit", dynamic_img_size=False), "timm/test_vit", 96)
    check_image_size(create_backbone("timm/test_vit"), "timm/test_vit", 96)  # its positions adapt themselves
    check_image_size(create_backbone("timm/test_vit", img_size=96, dynamic_img_size=False), "timm/test_vit", 96)


def test_positions_are_resized_as_timm_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = build("test_vit")
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone: Any = create_backbone("timm/test_vit", str(tmp_path / "weights.pth"), img_size=96)
    assert "pos_embed resized from 101 to 37 tokens" in capsys.readouterr().err
    theirs = timm.create_model("test_vit", pretrained=False, img_size=96)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(whole.state_dict(), theirs)
    assert torch.equal(backbone.pos_embed, filtered["pos_embed"])


# ---------------------------------------------------------------------- timm's own weights


def test_published_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    published = build("test_resnet")
    asked: list[str] = []

    def serve(place: str, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        asked.append(place)
        return dict(published.state_dict())

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", serve)
    backbone: Any = create_backbone("timm/test_resnet", "DEFAULT").eval()
    assert asked == ["timm/test_resnet.r160_in1k"]
    images = torch.randn(1, 3, 64, 64)
    source = backbone.source_classifier
    with torch.no_grad():
        logits = backbone(images) @ source["weight"].T + source["bias"]
        torch.testing.assert_close(logits, published(images))
    told = capsys.readouterr().err
    assert "loaded by their names. Left aside: fc.weight, fc.bias (the classifier)." in told
    assert "timm/test_resnet.r160_in1k" in told


def test_a_failing_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(
        ConfigurationError, match=r"\(timm/test_resnet.r160_in1k\), but got ConnectionError: no route"
    ) as e:
        create_backbone("timm/test_resnet", "DEFAULT")
    assert "`--model.weights path/to/file.pth`" in str(e.value)


def test_weights_that_there_are_not() -> None:
    with pytest.raises(ConfigurationError, match=r"'none', 'DEFAULT' or a path .*'V1'.*'timm/test_vit.r160_in1k'"):
        create_backbone("timm/test_vit", "V1")
    without = next(name for name in timm.list_models("*resnet*") if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(ConfigurationError, match="no published weights for"):
        create_backbone(f"timm/{without}", "DEFAULT")
    with pytest.raises(ConfigurationError, match=r"path of a file for `--model.weights_by_order true`"):
        create_backbone("timm/test_vit", "DEFAULT", weights_by_order=True)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigurationError, match=r"package timm .*pip install 'transfer-framework\[timm\]'"):
        create_backbone("timm/resnet18")
    with pytest.raises(ConfigurationError, match=r"got 'resnet19'. Did you mean"):
        create_backbone("resnet19")
    assert create_backbone("resnet8").num_features == 64
