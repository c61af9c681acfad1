"""timm's models as backbones, through the extra ``timm``."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch
from torch import nn

from framework.errors import ConfigurationError, did_you_mean
from framework.networks.preprocessing import Preprocessing
from framework.networks.torchvision_backbones import Built
from framework.networks.weights import Weights

PREFIX = "timm/"

# options that decide what the network returns or loads
RESERVED_OPTIONS = {
    "cache_dir",
    "checkpoint_path",
    "features_only",
    "num_classes",
    "out_indices",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
}


def list_timm_backbones(pattern: str = "*") -> list[str]:
    """The names ``timm/<name>`` that :func:`~framework.networks.create_backbone` knows with the extra ``timm``.

    Args:
        pattern: with ``*`` for any characters, such as ``convnext*``.

    Raises:
        ConfigurationError: timm is not installed.
    """
    return [PREFIX + name for name in _timm().list_models(pattern)]


def is_timm(name: str) -> bool:
    """Whether a backbone's name means one of timm's."""
    return name.startswith(PREFIX)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ConfigurationError(
            f"Expected the package timm for `--model.backbone {PREFIX}…`, but it is not installed: "
            "pip install 'transfer-framework[timm]'"
        ) from error
    module: ModuleType = timm
    return module


def check_timm_name(name: str) -> None:
    """Refuse a name that timm does not know, or a tag that names no weights of it.

    Raises:
        ConfigurationError: with the nearest names.
    """
    timm = _timm()
    plain = name[len(PREFIX) :]
    known = timm.list_models(include_tags=False)
    if not timm.is_model(plain):
        raise ConfigurationError(
            f"Expected `--model.backbone` to be a model of timm, but got {name!r}. "
            f"{did_you_mean(name, [PREFIX + model for model in known])}"
        )
    architecture, _, tag = plain.partition(".")
    tags = _tags(architecture)
    if tag and plain not in tags:
        raise ConfigurationError(
            f"Expected the tag of `--model.backbone` {name!r} to be one of timm's for {architecture!r}, but got "
            f"{tag!r}. {did_you_mean(name, [PREFIX + model for model in tags])}"
        )


def _tags(architecture: str) -> list[str]:
    tags: list[str] = _timm().list_pretrained(f"{architecture}.*")
    return tags


def check_timm_weights(name: str, weights: str) -> None:
    """Refuse a name of published weights that is not DEFAULT, or a model that has none.

    Raises:
        ConfigurationError: with what there is.
    """
    plain = name[len(PREFIX) :]
    tags = _tags(plain.partition(".")[0])
    if not tags:
        raise ConfigurationError(
            f"Expected `--model.weights` to be 'none' or a path to a .pth file, but got {weights!r}: "
            f"there are no published weights for {name!r}."
        )
    if weights.upper() != "DEFAULT":
        tagged = " or ".join(repr(PREFIX + tag) for tag in tags[:5])
        raise ConfigurationError(
            f"Expected `--model.weights` for {name!r} to be 'none', 'DEFAULT' or a path to a .pth file, but got "
            f"{weights!r}. What DEFAULT means is chosen by `--model.backbone`: {tagged}."
        )


def build_timm(name: str, options: dict[str, Any]) -> Built:
    """The model ``timm/<name>`` without its classifier: images to pooled features."""
    network = _create(name, options, num_classes=0)
    # what stands in front of the classifier, which some models widen after the pooling
    width = int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]
    if network.num_features != width:
        network.num_features = width  # type: ignore[assignment]
    with torch.device("meta"):
        whole = _create(name, options)
    own = set(network.state_dict())
    classifier = tuple(key for key in whole.state_dict() if key not in own)
    linear = {key.rpartition(".")[0] for key in classifier}
    ends = {key.rpartition(".")[2] for key in classifier}
    is_linear = len(linear) == 1 and "weight" in ends and ends <= {"weight", "bias"}
    return Built(network, _expected(network, options), classifier, linear.pop() if is_linear else None)


def _create(name: str, options: dict[str, Any], **fixed: Any) -> nn.Module:
    reserved = sorted(set(options) & RESERVED_OPTIONS)
    if reserved or options.get("global_pool") == "":
        key, value = (reserved[0], options[reserved[0]]) if reserved else ("global_pool", "")
        raise ConfigurationError(
            f"Expected `--model.backbone_options` that leave {name!r} a network of pooled features, but got "
            f"{key}={value!r}."
        )
    try:
        network: nn.Module = _timm().create_model(name[len(PREFIX) :], pretrained=False, **options, **fixed)
    except Exception as error:  # timm's models refuse what they do not take in many ways
        if not options:
            raise
        raise ConfigurationError(
            f"Expected `--model.backbone_options` that {name!r} takes{_known_options(name)}, but got {options!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return network


def _known_options(name: str) -> str:
    with torch.device("meta"):
        network = _timm().create_model(name[len(PREFIX) :], pretrained=False)
    parameters = set(inspect.signature(type(network).__init__).parameters) - {"self", "kwargs", *RESERVED_OPTIONS}
    return f" ({', '.join(sorted(parameters))})" if parameters else ""


def _expected(network: nn.Module, options: dict[str, Any]) -> Preprocessing:
    expected = _timm().data.resolve_model_data_config(network)
    size = options.get("img_size") or expected["input_size"][1:]
    # images are squares here; a network for another shape refuses them before training
    image_size = size if isinstance(size, int) else max(size)
    mean, std = (tuple(float(value) for value in expected[key]) for key in ("mean", "std"))
    return Preprocessing(image_size, mean, std)  # type: ignore[arg-type]


def download_timm(name: str, options: dict[str, Any]) -> Weights:
    """timm's own pretrained weights, brought by timm into a whole network with the same options."""
    timm = _timm()
    plain = name[len(PREFIX) :]
    try:
        whole = timm.create_model(plain, pretrained=True, **options)
    except Exception as error:  # a download fails in as many ways as there are libraries under it
        raise ConfigurationError(
            f"Expected to download timm's weights of {name!r} ({_place(plain)}), but got {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}. Download them elsewhere and pass the file as "
            "`--model.weights path/to/file.pth`."
        ) from error
    return Weights(whole.state_dict(), f"timm's {_place(plain)}")


def _place(plain: str) -> str:
    config = _timm().get_pretrained_cfg(plain)
    return str(config.hf_hub_id or config.url)
