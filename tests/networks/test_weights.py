"""Files of weights: by name, by order, what is reported, and the classifier that came with them."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.networks import create_backbone, resnet8
from framework.networks.preprocessing import Preprocessing
from framework.networks.weights import match_by_order

State = OrderedDict[str, Tensor]


def trained() -> nn.Module:
    """A classifier of ten classes whose batch-norm statistics are not the initial ones."""
    network = resnet8(10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(7)
    return network.eval()


def renamed(state: dict[str, Tensor], counters: bool = True) -> State:
    """Other names, which keep what batch norm's tensors are."""
    kept = [key for key in state if counters or not key.endswith("num_batches_tracked")]
    return OrderedDict((f"part{i:03d}.{key.rpartition('.')[2]}", state[key]) for i, key in enumerate(kept))


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


# ---------------------------------------------------------------------- by order


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("classifier", [True, False])
def test_other_names_in_the_same_order(tmp_path: Path, counters: bool, classifier: bool) -> None:
    network = trained()
    state = {key: value for key, value in network.state_dict().items() if classifier or not key.startswith("fc.")}
    path = saved(tmp_path / "other.pth", renamed(state, counters))
    backbone: Any = create_backbone("resnet8", path, weights_by_order=True).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network.fc(backbone(images)), network(images))  # type: ignore[operator]
    assert backbone.bn1.num_batches_tracked == 0  # not looked at
    if classifier:
        assert torch.equal(backbone.source_classifier["weight"], network.fc.weight)  # type: ignore[union-attr, arg-type]
        assert torch.equal(backbone.source_classifier["bias"], network.fc.bias)  # type: ignore[union-attr, arg-type]
    else:
        assert backbone.source_classifier is None


def test_names_that_fit_only_by_order_get_a_hint(tmp_path: Path) -> None:
    path = saved(tmp_path / "other.pth", renamed(trained().state_dict()))
    with pytest.raises(ConfigurationError, match=r"missing .*unexpected .*`--model.weights_by_order true` takes them"):
        create_backbone("resnet8", path)
    with pytest.raises(ConfigurationError) as caught:  # another network: the order would not help
        create_backbone("resnet20", path)
    assert "by_order" not in str(caught.value)


def change(state: State, kind: str) -> State:
    keys = [key for key in state if not key.startswith("x")]
    if kind == "shape":
        state[keys[6]] = torch.zeros(3)
    if kind == "swapped":  # all of a batch norm's vectors have one shape: the names' ends tell
        order = [*keys[:1], keys[3], keys[4], keys[1], keys[2], *keys[5:]]
        state = OrderedDict((key, state[key]) for key in order)
    if kind == "short":
        state = OrderedDict((key, state[key]) for key in keys[:-4])
    if kind == "long":
        state["more.weight"] = torch.zeros(2)
    if kind == "wide":
        state = OrderedDict((key, state[key]) for key in keys[:-2])
        state["head.weight"] = torch.zeros(10, 63)
        state["head.bias"] = torch.zeros(10)
    if kind == "mlp":
        state["head2.weight"] = torch.zeros(5, 10)
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"tensor 6 of 35 is part006.weight \(3,\) in the file and layer1.0.conv1.weight \(16, 16, 3, 3\) in"),
        (
            "swapped",
            r"tensor 2 of 35 is part003.running_mean \(16,\) in the file and bn1.weight \(16,\) in the network",
        ),
        ("short", r"ends after 34 of 35: the next is layer3.0.bn2.running_var \(64,\)"),
        ("long", r"goes on after all 35 with part042.weight \(10, 64\), where a classifier \[classes, 64\] may follow"),
        ("wide", r"goes on after all 35 with head.weight \(10, 63\), where a classifier"),
        ("mlp", r"goes on after all 35 with part042.weight"),
    ],
)
def test_the_first_disagreement_is_named(tmp_path: Path, kind: str, message: str) -> None:
    path = saved(tmp_path / "other.pth", change(renamed(trained().state_dict()), kind))
    with pytest.raises(ConfigurationError, match=message) as caught:
        create_backbone("resnet8", path, weights_by_order=True)
    assert path in str(caught.value)


def test_the_matching_is_a_permutation_of_names() -> None:
    reference = {"a.weight": torch.zeros(2, 3), "a.num_batches_tracked": torch.zeros(()), "b.bias": torch.zeros(4)}
    state = {"x.weight": torch.zeros(2, 3), "y.bias": torch.zeros(4), "y.num_batches_tracked": torch.zeros(())}
    assert match_by_order(state, reference, "it") == {"a.weight": "x.weight", "b.bias": "y.bias"}
    with pytest.raises(ConfigurationError, match="goes on after all 2 with z"):
        match_by_order(state | {"z": torch.zeros(5, 4)}, reference, "it")  # no classifier was announced


def test_the_flag_needs_a_file() -> None:
    assert create_backbone("resnet8", None, weights_by_order=True).source_classifier is None
    assert create_backbone("resnet8", "none", weights_by_order=True).num_features == 64
    with pytest.raises(ConfigurationError, match=r"`--model.weights` to be the path of a file .* got 'DEFAULT'"):
        create_backbone("resnet18", "DEFAULT", weights_by_order=True)


# ---------------------------------------------------------------------- the classifier


def test_the_source_classifier_is_the_networks(tmp_path: Path) -> None:
    network = trained()
    path = saved(tmp_path / "weights.pth", {"state_dict": network.state_dict()})
    backbone: Any = create_backbone("resnet8", path).eval()
    images = torch.randn(3, 3, 32, 32)
    source = backbone.source_classifier
    torch.testing.assert_close(backbone(images) @ source["weight"].T + source["bias"], network(images))
    assert backbone.state_dict().keys() == resnet8().state_dict().keys()
    twin: Any = copy.deepcopy(backbone)
    assert torch.equal(twin.source_classifier["weight"], source["weight"])
    assert twin.source_classifier["weight"] is not source["weight"]
    assert twin.preprocessing == backbone.preprocessing
    assert not source["weight"].requires_grad


def test_torchvisions_source_classifiers(tmp_path: Path) -> None:
    """The last layer of several is linear and is kept; a SqueezeNet's is a convolution before the pooling."""
    for name, classifier in (
        ("mobilenet_v3_small", "classifier.3"),
        ("shufflenet_v2_x0_5", "fc"),
        ("squeezenet1_1", ""),
    ):
        network = torchvision.models.get_model(name, weights=None, num_classes=7)
        path = saved(tmp_path / f"{name}.pth", network.state_dict())
        source: Any = create_backbone(name, path).source_classifier
        if classifier:
            assert torch.equal(source["weight"], network.get_parameter(f"{classifier}.weight"))
            assert torch.equal(source["bias"], network.get_parameter(f"{classifier}.bias"))
        else:
            assert source is None


@pytest.mark.parametrize(("bottleneck", "found"), [(False, True), (True, False)])
def test_a_checkpoints_head_counts_where_nothing_is_between(tmp_path: Path, bottleneck: bool, found: bool) -> None:
    state = {f"backbone.{key}": value for key, value in resnet8().state_dict().items()}
    if bottleneck:
        state["bottleneck.0.weight"] = torch.zeros(64, 64)
    state |= {"head.weight": torch.ones(4, 64), "head.bias": torch.arange(4.0)}
    backbone: Any = create_backbone("resnet8", saved(tmp_path / "last.ckpt", {"state_dict": state}))
    assert (backbone.source_classifier is not None) == found
    if found:
        assert torch.equal(backbone.source_classifier["bias"], torch.arange(4.0))


def test_a_file_without_classifier_has_none(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.pth", resnet8().state_dict())
    assert create_backbone("resnet8", path).source_classifier is None
    assert create_backbone("resnet8").source_classifier is None


# ---------------------------------------------------------------------- what is said


def test_what_is_left_aside_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"backbone.{key}": value for key, value in resnet8().state_dict().items() if "num_batches" not in key}
    state |= {"head.weight": torch.ones(4, 64), "head.bias": torch.ones(4), "val_accuracy.tp": torch.ones(())}
    path = saved(tmp_path / "last.ckpt", {"state_dict": state})
    create_backbone("resnet8", path)
    assert capsys.readouterr().err == (
        f"Weights of 'resnet8': 35 of the 38 tensors in '{path}' loaded by their names. Left aside: 3 outside the "
        "backbone (head.weight, head.bias, val_accuracy.tp). As built: 7 num_batches_tracked.\n"
    )
    path = saved(tmp_path / "other.pth", renamed(trained().state_dict()))
    create_backbone("resnet8", path, weights_by_order=True)
    assert capsys.readouterr().err == (
        f"Weights of 'resnet8': 35 of the 44 tensors in '{path}' loaded by their order. Left aside: part042.weight, "
        "part043.bias (the classifier); 7 num_batches_tracked. As built: 7 num_batches_tracked.\n"
    )
    create_backbone("resnet8")
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_it_is_said_once_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.pth", trained().state_dict())
    for before in ("", "import lightning.pytorch; ", "import logging; logging.basicConfig(level='INFO'); "):
        program = f"{before}from framework.networks import create_backbone; create_backbone('resnet8', {path!r})"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert result.stderr.count("42 of the 44 tensors") == 1, result.stderr


# ---------------------------------------------------------------------- formats


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    network = trained()
    safetensors.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    backbone = create_backbone("resnet8", str(tmp_path / "weights.safetensors")).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network.fc(backbone(images)), network(images))  # type: ignore[operator]
    (tmp_path / "broken.safetensors").write_text("<html>")
    with pytest.raises(ConfigurationError, match="could not read it"):
        create_backbone("resnet8", str(tmp_path / "broken.safetensors"))


def test_a_vision_transformers_positions_are_resized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torchvision's own interpolation, where the network is built for another size than the file's."""
    network = torchvision.models.VisionTransformer(32, 8, 1, 2, 8, 16)
    target = torchvision.models.VisionTransformer(48, 8, 1, 2, 8, 16)
    from framework.networks.weights import Weights, load_weights

    target.heads.head, target.num_features = nn.Identity(), 8
    found = Weights(network.state_dict(), "'it'")
    load_weights(target, "vit", found, classifier=("heads.head.",), linear="heads.head")
    assert "encoder.pos_embedding resized from 17 to 37 tokens" in capsys.readouterr().err
    old, new = network.encoder.pos_embedding, target.encoder.pos_embedding
    assert torch.equal(old[:, 0], new[:, 0])  # the class token's
    grid = old[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = nn.functional.interpolate(grid, (6, 6), mode="bicubic", align_corners=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(new[:, 1:], expected)


# ---------------------------------------------------------------------- what a file says of its images


def test_a_file_may_say_what_it_expects(tmp_path: Path) -> None:
    described = {"image_size": 40, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    path = saved(tmp_path / "weights.pth", {"state_dict": trained().state_dict(), "preprocessing": described})
    backbone: Any = create_backbone("resnet8", path)
    assert backbone.preprocessing == Preprocessing(40, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert backbone.preprocessing.plain() == described


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"image_size": 40, "mean": [0.1, 0.2], "std": [1, 1, 1]},
        {"image_size": 0, "mean": [0.1] * 3, "std": [1] * 3},
        {"image_size": 4, "mean": [0.1] * 3, "std": [1, 0, 1]},
        {"image_size": 4, "mean": "abc", "std": [1, 1, 1]},
        {"image_size": 4, "mean": None, "std": [1, 1, 1]},
    ],
)
def test_what_it_says_must_make_sense(tmp_path: Path, described: dict[str, Any]) -> None:
    path = saved(tmp_path / "weights.pth", {"state_dict": trained().state_dict(), "preprocessing": described})
    with pytest.raises(ConfigurationError, match=r"'preprocessing' in '.*weights.pth' to hold 'image_size'"):
        create_backbone("resnet8", path)
