from __future__ import annotations

import inspect
from collections import OrderedDict
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from framework.errors import ConfigurationError
from framework.networks import ResidualNetwork, create_backbone, list_backbones, resnet8, resnet18
from framework.networks.torchvision_backbones import _strip_classifier

# name, width of the features, smallest comfortable image
TORCHVISION = [
    ("alexnet", 4096, 224),
    ("convnext_tiny", 768, 32),
    ("densenet121", 1024, 32),
    ("efficientnet_b0", 1280, 32),
    ("efficientnet_v2_s", 1280, 32),
    ("googlenet", 1024, 64),
    ("inception_v3", 2048, 96),
    ("maxvit_t", 512, 224),
    ("mnasnet0_5", 1280, 32),
    ("mobilenet_v2", 1280, 32),
    ("mobilenet_v3_small", 1024, 32),
    ("regnet_y_400mf", 440, 32),
    ("resnext50_32x4d", 2048, 32),
    ("shufflenet_v2_x0_5", 1024, 32),
    ("squeezenet1_1", 512, 64),
    ("swin_t", 768, 64),
    ("swin_v2_t", 768, 64),
    ("vgg11_bn", 4096, 224),
    ("vit_b_16", 768, 224),
]
FREE_SIZE = {"densenet121", "efficientnet_b0", "inception_v3", "mobilenet_v3_small", "squeezenet1_1", "googlenet"}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _no_initialization(monkeypatch):
    """What is tested on the meta device needs no random numbers."""
    for name in ("trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


def test_list_holds_both_kinds():
    names = list_backbones()
    assert names == sorted(set(names))
    assert {"resnet8", "resnet110", "resnet152", "vit_b_16", "alexnet"} <= set(names)
    assert not {"fcn_resnet50", "fasterrcnn_resnet50_fpn", "quantized_resnet18"} & set(names)


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "resnet34"])
def test_own_networks_win(name):
    backbone = create_backbone(name)
    assert type(backbone) is ResidualNetwork
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, backbone.num_features)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("_no_initialization")
@pytest.mark.parametrize(("name", "num_features", "size"), TORCHVISION)
@pytest.mark.parametrize("training", [True, False])
def test_torchvision_backbone_returns_features(name, num_features, size, training):
    backbone = create_backbone(name).to_empty(device="meta").train(training)
    features = backbone(torch.empty(2, 3, size, size, device="meta"))
    assert isinstance(features, torch.Tensor)
    assert features.shape == (2, num_features)
    assert backbone.num_features == num_features


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_every_kind_of_classifier_loses_its_last_layer():
    """One network of each of torchvision's classes, the regnets aside: a new class is tested by existing."""
    kinds = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        kinds.setdefault(inspect.signature(torchvision.models.get_model_builder(name)).return_annotation, name)
    names = [name for name in kinds.values() if not name.startswith("regnet")]  # they compute widths with tensors
    assert len(names) >= 16
    for name in names:
        with torch.device("meta"):
            network = torchvision.models.get_model(name, weights=None, num_classes=17)
        before = dict(network.named_modules())
        classifier, _ = _strip_classifier(network)
        removed = before[classifier]
        assert (removed.out_channels if "squeezenet" in name else removed.out_features) == 17, name
        assert network.num_features == (removed.in_channels if "squeezenet" in name else removed.in_features), name
        assert isinstance(network.get_submodule(classifier), nn.Identity)


@pytest.mark.parametrize("name", sorted(FREE_SIZE))
def test_features_are_what_torchvisions_classifier_sees(name, tmp_path):
    """A local file of the whole classifier, auxiliary ones included, gives the features in front of its last layer."""
    options = {"init_weights": False, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    classifier = torchvision.models.get_model(name, weights=None, num_classes=5, **options).eval()
    captured = {}
    last = [m for m in classifier.modules() if isinstance(m, nn.Conv2d if "squeeze" in name else nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _module, inputs: captured.update(features=inputs[0]))
    images = torch.randn(1, 3, 96, 96)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    backbone = create_backbone(name, str(tmp_path / "weights.pth")).eval()
    with torch.no_grad():
        classifier(images)
        features = backbone(images)
    expected = captured["features"]
    torch.testing.assert_close(features, expected.mean((2, 3)) if expected.ndim == 4 else expected)


def test_dropout_in_front_of_the_classifier_goes_and_the_others_stay():
    backbone = create_backbone("alexnet")
    assert [type(layer) for layer in backbone.classifier][-1] is nn.Identity
    assert sum(isinstance(module, nn.Dropout) for module in backbone.modules()) == 2
    assert not any(isinstance(module, nn.Dropout) for module in create_backbone("mobilenet_v3_small").modules())


# options


def test_options_reach_the_constructors():
    own = create_backbone("resnet8", shortcut="B", stochastic_depth=0.3, in_channels=1)
    assert own.layer2[0].downsample[0].kernel_size == (1, 1)
    assert own.layer3[0].stochastic_depth.p == pytest.approx(0.3)
    assert own.conv1.in_channels == 1
    theirs = create_backbone("densenet121", drop_rate=0.25)
    assert theirs.features.denseblock1.denselayer1.drop_rate == 0.25


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8", {"depth": 3}, "`--model.backbone_options` that 'resnet8' has .*stochastic_depth.*but got 'depth'"),
        ("resnet8", {"num_classes": 3}, "but got 'num_classes'"),
        ("resnet8", {"shortcut": "C"}, "'A' or 'B', but got 'C'"),
        ("efficientnet_b0", {"colour": 1}, "'efficientnet_b0'.*dropout.*but got 'colour'"),
        ("convnext_tiny", {"colour": 1}, "'convnext_tiny'.*layer_scale.*but got 'colour'"),  # it takes **kwargs
        ("mobilenet_v2", {"num_classes": 3}, "but got 'num_classes'"),
        ("googlenet", {"aux_logits": True}, "but got 'aux_logits'"),
        ("vit_b_16", {"patch_size": 8}, "`--model.backbone_options` that 'vit_b_16' takes.*patch_size"),
    ],
)
def test_unknown_options(name, options, message):
    with pytest.raises(ConfigurationError, match=message):
        create_backbone(name, **options)


def test_unknown_name():
    with pytest.raises(ConfigurationError, match=r"`--model.backbone` .* got 'resnet19'. Did you mean .*'resnet18'"):
        create_backbone("resnet19")


# local weights


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "module", "checkpoint"])
def test_local_weights(tmp_path, form):
    trained = resnet8(10)
    nn.init.normal_(trained.bn1.running_mean)
    state = trained.state_dict()
    content = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": dict(state)},
        "module": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        "checkpoint": {
            "state_dict": {
                **{f"backbone.{key}": value for key, value in resnet8().state_dict().items()},
                **{f"backbone.{key}": value for key, value in state.items() if not key.startswith("fc.")},
                "head.weight": torch.zeros(2, 64),
            }
        },
    }[form]
    path = tmp_path / ("last.ckpt" if form == "checkpoint" else "weights.pth")
    torch.save(content, path)
    backbone = create_backbone("resnet8", str(path)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(trained.eval().fc(backbone(images)), trained(images))


def test_none_is_from_scratch():
    assert create_backbone("resnet8", "none").num_features == create_backbone("resnet8", None).num_features == 64


def test_mnasnet_and_densenet_files_of_old(tmp_path):
    """MNASNet refuses a state dict without version; published DenseNets have keys with one dot more."""
    for name in ("mnasnet0_5", "densenet121"):
        state = dict(torchvision.models.get_model(name, weights=None).state_dict())
        old = {}
        for key, value in state.items():
            for part in ("norm1", "norm2", "conv1", "conv2"):
                if "denselayer" in key:
                    key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.")
            if not key.endswith("num_batches_tracked"):  # files older than torch 0.4.1 have none
                old[key] = value
        path = tmp_path / f"{name}.pth"
        torch.save(old, path)
        loaded = create_backbone(name, str(path)).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def broken(change: str) -> OrderedDict[str, torch.Tensor]:
    state = resnet8(10).state_dict()
    if change == "missing":
        del state["layer1.0.conv1.weight"]
    if change == "unexpected":
        state["layer9.weight"] = torch.zeros(1)
    if change == "shape":
        state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    if change == "many":
        state = OrderedDict((key, value) for key, value in state.items() if not key.startswith("layer2"))
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"got entries 1 missing \(layer1.0.conv1.weight\)\."),
        ("unexpected", r"got entries 1 unexpected \(layer9.weight\)\."),
        ("shape", r"1 of another shape \(conv1.weight \(16, 1, 3, 3\) instead of \(16, 3, 3, 3\)\)\."),
        ("many", r"got entries 10 missing \(layer2.0.conv1.weight, .*, …\)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    path = tmp_path / "weights.pth"
    torch.save(broken(change), path)
    with pytest.raises(ConfigurationError, match=message) as caught:
        create_backbone("resnet8", str(path))
    assert str(path) in str(caught.value)


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(ConfigurationError, match=r"an existing file, but found none at '.*absent.pth'"):
        create_backbone("resnet8", str(tmp_path / "absent.pth"))
    text = tmp_path / "text.pth"
    text.write_text("<html>not found</html>")
    whole = tmp_path / "whole.pth"
    torch.save(resnet8(), whole)  # a pickled module: arbitrary code, which weights_only refuses
    empty = tmp_path / "empty.pth"
    empty.touch()
    for path in (text, whole, empty):
        with pytest.raises(ConfigurationError, match="could not read it"):
            create_backbone("resnet8", str(path))
    numbers = tmp_path / "numbers.pth"
    for content in ([1, 2], {"a": 1}, {}):
        torch.save(content, numbers)
        with pytest.raises(ConfigurationError, match="to hold a state dict, plain or under"):
            create_backbone("resnet8", str(numbers))


# published weights


@pytest.fixture
def _offline(monkeypatch, tmp_path):
    """An empty cache and a network that is down."""

    def fail(url, *args, **kwargs):
        raise URLError(f"no route to {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_failing_download(name):
    url = torchvision.models.get_model_weights(name)["DEFAULT"].url
    with pytest.raises(ConfigurationError) as caught:
        create_backbone(name, "DEFAULT")
    assert url in str(caught.value)
    assert "`--model.weights path/to/file.pth`" in str(caught.value)
    assert "URLError" in str(caught.value)


def test_wrong_hash(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("invalid hash value")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ConfigurationError, match=r"download https://.*invalid hash value.*--model.weights path"):
        create_backbone("resnet18", "IMAGENET1K_V1")


@pytest.mark.parametrize(("name", "weights"), [("resnet18", "DEFAULT"), ("resnet18", "IMAGENET1K_V1")])
def test_published_weights_are_checked_and_loaded(monkeypatch, name, weights):
    published = torchvision.models.resnet18()
    asked = {}

    def serve(url, *args, **kwargs):
        asked.update(url=url, **kwargs)
        return published.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", serve)
    backbone = create_backbone(name, weights).eval()
    assert asked["url"] == torchvision.models.ResNet18_Weights[weights].url
    assert asked["check_hash"] is True
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(published.eval().fc(backbone(images)), published(images))
    with pytest.raises(ConfigurationError, match=r"18 unexpected \(layer2.0.downsample.0.weight"):
        create_backbone(name, weights, shortcut="A")


def test_unknown_weights():
    with pytest.raises(
        ConfigurationError, match=r"`--model.weights` for 'resnet50' .*'IMAGENET1K_V1'.*'IMAGENET1K_V2'"
    ):
        create_backbone("resnet50", "IMAGENET")
    with pytest.raises(ConfigurationError, match="no published weights for 'resnet20'"):
        create_backbone("resnet20", "DEFAULT")


def test_same_weights_in_resnet18_and_backbone_file(tmp_path):
    """A file without classifier, as a backbone's own state dict is."""
    trained = resnet18()
    torch.save(trained.state_dict(), tmp_path / "backbone.pt")
    restored = create_backbone("resnet18", str(tmp_path / "backbone.pt"))
    assert all(torch.equal(value, restored.state_dict()[key]) for key, value in trained.state_dict().items())
