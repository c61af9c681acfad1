"""One door to every backbone: the networks of this package and torchvision's classifiers."""

from __future__ import annotations

import inspect
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from framework.errors import ConfigurationError, did_you_mean
from framework.networks.residual import RESIDUAL_NETWORKS, ResidualOptions

StateDict = OrderedDict[str, Tensor]

# options that decide what the network returns or loads, which is this module's business
RESERVED_OPTIONS = {"num_classes", "weights", "progress", "aux_logits", "init_weights"}
AUXILIARY_CLASSIFIERS = ("aux1", "aux2", "AuxLogits")  # googlenet, googlenet, inception_v3


def list_backbones() -> list[str]:
    """The names that :func:`create_backbone` knows, sorted."""
    return sorted({*RESIDUAL_NETWORKS, *torchvision.models.list_models(module=torchvision.models)})


def create_backbone(name: str, weights: str | None = None, **options: Any) -> nn.Module:
    """Build a network without its classifier: images ``[N, 3, H, W]`` to features ``[N, num_features]``.

    ``resnet8`` to ``resnet152`` are this package's (:mod:`framework.networks.residual`), every other name is a
    classifier of torchvision, of which the last linear layer and the dropout right before it are replaced by the
    identity. ``googlenet`` and ``inception_v3`` come without auxiliary classifiers and always with
    ``transform_input=True``: they take images normalised like every other network's, with and without weights.

    Args:
        name: one of :func:`list_backbones`.
        weights: None or "none" to start from scratch; "DEFAULT" or a torchvision name such as "IMAGENET1K_V1" to
            download; or a path to a ``.pth``, ``.pt`` or ``.ckpt`` file with a state dict, plain or under
            "state_dict" or "model". A prefix ``module.`` is stripped; if there are keys under ``backbone.`` (a
            checkpoint of this framework), these are taken. The classifier's entries are dropped.
        options: go to the network's constructor, e.g. ``stochastic_depth=0.1``.

    Returns:
        A module with the integer attribute ``num_features``.

    Raises:
        ConfigurationError: an unknown name, option or weights name, a file or download that cannot be read, or
            weights with missing, unexpected or wrongly shaped entries.
    """
    if name not in list_backbones():
        raise ConfigurationError(
            f"Expected `--model.backbone` to be a known network, but got {name!r}. "
            f"{did_you_mean(name, list_backbones())}"
        )
    if weights is not None and weights.lower() == "none":
        weights = None
    # before the network is built: a mistyped name should not cost the seconds that a large network takes
    entry = None if weights is None or _is_path(weights) else _published_weights(name, weights)
    if name in RESIDUAL_NETWORKS:
        backbone: nn.Module = _build_residual(name, options)
        classifiers: tuple[str, ...] = ("fc",)
    else:
        backbone, classifiers = _build_torchvision(name, options, initialize=weights is None)
    if weights is not None:
        state = _read_file(Path(weights)) if entry is None else _download(entry)
        _load(backbone, state, classifiers, f"{name!r} from `--model.weights` {weights!r}")
    return backbone


def _build_residual(name: str, options: dict[str, Any]) -> nn.Module:
    _check_options(name, options, set(ResidualOptions.__annotations__))
    return RESIDUAL_NETWORKS[name](**options)


def _build_torchvision(name: str, options: dict[str, Any], initialize: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """The network without its classifier, and the names of the classifiers in its published state dicts."""
    builder = torchvision.models.get_model_builder(name)
    network = inspect.signature(builder).return_annotation
    known = set(inspect.signature(network.__init__).parameters) - {"self", "kwargs"} - RESERVED_OPTIONS
    _check_options(name, options, known)
    defaults: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # torchvision sets transform_input with pretrained weights only; a checkpoint of a fine-tuned network is
        # restored into one built without weights, which would then see other inputs than it was trained on
        defaults = {"aux_logits": False, "transform_input": True, "init_weights": initialize}
    try:
        backbone: nn.Module = builder(weights=None, **{**defaults, **options})
    except (TypeError, ValueError) as error:  # an option that the builder itself fixes, or a bad value
        raise ConfigurationError(
            f"Expected `--model.backbone_options` that {name!r} takes, but got {options!r}: {error}"
        ) from error
    return backbone, (_strip_classifier(backbone), *AUXILIARY_CLASSIFIERS)


def _check_options(name: str, options: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        listed = ", ".join(sorted(known))
        raise ConfigurationError(
            f"Expected `--model.backbone_options` that {name!r} has ({listed}), but got {unknown[0]!r}."
        )


def _strip_classifier(network: nn.Module) -> str:
    """Replace the classifier by the identity, set ``num_features`` and return the classifier's name.

    The classifier is the last layer that has one output per class: linear, or the 1x1 convolution of a SqueezeNet.
    """
    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    index, name, num_features = -1, "", 0
    for position, (leaf_name, leaf) in enumerate(leaves):
        if isinstance(leaf, nn.Linear):
            index, name, num_features = position, leaf_name, leaf.in_features
        elif isinstance(leaf, nn.Conv2d) and isinstance(network, torchvision.models.SqueezeNet):
            index, name, num_features = position, leaf_name, leaf.in_channels
    _replace(network, name, nn.Identity())
    # the dropout belongs to the classifier: it would put noise on the features that losses compare
    if isinstance(leaves[index - 1][1], nn.Dropout):
        _replace(network, leaves[index - 1][0], nn.Identity())
    network.num_features = num_features  # type: ignore[assignment]
    return name


def _replace(network: nn.Module, name: str, replacement: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, replacement)


def _is_path(weights: str) -> bool:
    return Path(weights).suffix in (".pth", ".pt", ".ckpt") or "/" in weights or "\\" in weights


def _published_weights(name: str, weights: str) -> Any:
    """The member of torchvision's enumeration of weights."""
    available = torchvision.models.list_models(module=torchvision.models)
    if name not in available:
        raise ConfigurationError(
            f"Expected `--model.weights` to be 'none' or a path to a .pth file, but got {weights!r}: "
            f"there are no published weights for {name!r}."
        )
    entries = torchvision.models.get_model_weights(name)
    if weights not in entries.__members__:
        listed = ", ".join(repr(member) for member in entries.__members__)
        raise ConfigurationError(
            f"Expected `--model.weights` for {name!r} to be 'none', {listed} or a path to a .pth file, "
            f"but got {weights!r}."
        )
    return entries[weights]


def _download(entry: Any) -> StateDict:
    try:
        state: StateDict = entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # URLError is an OSError
        raise ConfigurationError(
            f"Expected to download {entry.url}, but got {type(error).__name__}: {error}. Download it elsewhere "
            "and pass the file as `--model.weights path/to/file.pth`."
        ) from error
    return state


def _read_file(path: Path) -> StateDict:
    if not path.is_file():
        raise ConfigurationError(f"Expected `--model.weights` to be an existing file, but found none at {str(path)!r}.")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"Expected `--model.weights` {str(path)!r} to hold a state dict of plain tensors, "
            f"but could not read it: {type(error).__name__}: {reason}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigurationError(
            f"Expected `--model.weights` {str(path)!r} to hold a state dict, plain or under 'state_dict' or 'model', "
            f"but got a {type(content).__name__} of other things."
        )
    state = OrderedDict(content)
    if hasattr(content, "_metadata"):
        state._metadata = content._metadata  # type: ignore[attr-defined]
    state = _below(state, "module.")
    return _below(state, "backbone.")


def _below(state: StateDict, prefix: str) -> StateDict:
    """The entries under ``prefix`` without it, or all if there are none; with the versions that modules look at."""
    if not any(key.startswith(prefix) for key in state):
        return state
    below = OrderedDict((key[len(prefix) :], value) for key, value in state.items() if key.startswith(prefix))
    # the version of "backbone" is listed without the dot
    versions = {f"{key}.": version for key, version in getattr(state, "_metadata", {}).items()}
    below._metadata = OrderedDict(  # type: ignore[attr-defined]
        (key[len(prefix) : -1], version) for key, version in versions.items() if key.startswith(prefix)
    )
    return below


def _load(backbone: nn.Module, state: StateDict, classifiers: tuple[str, ...], what: str) -> None:
    """Load ``state`` without the classifiers' entries; whatever else does not fit is an error."""
    # published DenseNets have "norm.1" where the modules have "norm1"
    renamed = {key: re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key) for key in state}
    dropped = tuple(f"{classifier}." for classifier in classifiers)
    kept = OrderedDict((renamed[key], value) for key, value in state.items() if not key.startswith(dropped))
    # MNASNet refuses a state dict without a version, which plain dicts have lost
    kept._metadata = {"": {"version": 2}, **getattr(state, "_metadata", {})}  # type: ignore[attr-defined]

    shapes = {key: tuple(value.shape) for key, value in backbone.state_dict().items()}
    misshapen = [key for key, value in kept.items() if key in shapes and tuple(value.shape) != shapes[key]]
    problems = [f"{key} {tuple(kept[key].shape)} instead of {shapes[key]}" for key in misshapen]
    for key in misshapen:
        del kept[key]
    incompatible = backbone.load_state_dict(kept, strict=False)
    found = {
        "missing": [key for key in incompatible.missing_keys if key not in misshapen],
        "unexpected": list(incompatible.unexpected_keys),
        "of another shape": problems,
    }
    complaints = [f"{len(keys)} {kind} ({_shorten(keys)})" for kind, keys in found.items() if keys]
    if complaints:
        raise ConfigurationError(f"Expected weights that fit {what}, but got entries {'; '.join(complaints)}.")


def _shorten(keys: list[str], shown: int = 3) -> str:
    return ", ".join(keys[:shown]) + (", …" if len(keys) > shown else "")
