"""torchvision's classifiers as backbones."""

from __future__ import annotations

import inspect
import pickle
from typing import Any, NamedTuple

import torchvision
from torch import nn

from framework.errors import ConfigurationError
from framework.networks.preprocessing import Preprocessing
from framework.networks.weights import Weights

# options that decide what the network returns or loads, which is not the user's business here
RESERVED_OPTIONS = {"num_classes", "weights", "progress", "aux_logits", "init_weights"}
AUXILIARY_CLASSIFIERS = ("aux1", "aux2", "AuxLogits")  # googlenet, googlenet, inception_v3


class Built(NamedTuple):
    """A network without its classifier.

    Attributes:
        backbone: with the attribute ``num_features``.
        preprocessing: what the network expects where its weights do not say otherwise.
        classifier: prefixes of the classifier's entries in a state dict of the whole network.
        linear: the classifier's name, if it is one linear layer on the features.
    """

    backbone: nn.Module
    preprocessing: Preprocessing
    classifier: tuple[str, ...]
    linear: str | None


def list_torchvision() -> list[str]:
    """The names of torchvision's classifiers."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def build_torchvision(name: str, options: dict[str, Any], initialize: bool) -> Built:
    """The classifier ``name`` without its last layer."""
    builder = torchvision.models.get_model_builder(name)
    network = inspect.signature(builder).return_annotation
    known = set(inspect.signature(network.__init__).parameters) - {"self", "kwargs"} - RESERVED_OPTIONS
    check_options(name, options, known)
    defaults: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # torchvision sets transform_input with pretrained weights only; a checkpoint of a fine-tuned network is
        # restored into one built without weights, which would then see other inputs than it was trained on
        defaults = {"aux_logits": False, "transform_input": True, "init_weights": initialize}
    try:
        backbone: nn.Module = builder(weights=None, **{**defaults, **options})
    except (TypeError, ValueError, RuntimeError) as error:  # an option that the builder itself fixes, or a bad value
        raise ConfigurationError(
            f"Expected `--model.backbone_options` that {name!r} takes, but got {options!r}: {error}"
        ) from error
    classifier, linear = _strip_classifier(backbone)
    prefixes = tuple(f"{prefix}." for prefix in (classifier, *AUXILIARY_CLASSIFIERS))
    return Built(backbone, _expected(name, backbone), prefixes, classifier if linear else None)


def check_options(name: str, options: dict[str, Any], known: set[str]) -> None:
    """Refuse an option that the network ``name`` does not have."""
    unknown = sorted(set(options) - known)
    if unknown:
        listed = ", ".join(sorted(known))
        raise ConfigurationError(
            f"Expected `--model.backbone_options` that {name!r} has ({listed}), but got {unknown[0]!r}."
        )


def torchvision_preprocessing(name: str, weights: str = "DEFAULT") -> Preprocessing:
    """What published weights were evaluated with."""
    transforms = torchvision.models.get_model_weights(name)[weights].transforms()
    return Preprocessing(transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std))


def _expected(name: str, backbone: nn.Module) -> Preprocessing:
    preprocessing = torchvision_preprocessing(name)
    if isinstance(backbone, torchvision.models.VisionTransformer):  # takes one size, which is an option
        preprocessing = preprocessing._replace(image_size=backbone.image_size)
    return preprocessing


def _strip_classifier(network: nn.Module) -> tuple[str, bool]:
    """Replace the classifier by the identity, set ``num_features``; return the classifier's name, and if it is linear.

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
    return name, isinstance(leaves[index][1], nn.Linear)


def _replace(network: nn.Module, name: str, replacement: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, replacement)


def torchvision_entry(name: str, weights: str) -> Any:
    """The member of torchvision's enumeration of weights.

    Raises:
        ConfigurationError: there is none of that name.
    """
    entries = torchvision.models.get_model_weights(name)
    if weights not in entries.__members__:
        listed = ", ".join(repr(member) for member in entries.__members__)
        raise ConfigurationError(
            f"Expected `--model.weights` for {name!r} to be 'none', {listed} or a path to a .pth file, "
            f"but got {weights!r}."
        )
    return entries[weights]


def download_torchvision(name: str, weights: str) -> Weights:
    """Published weights, from torchvision's server or the cache."""
    entry = torchvision_entry(name, weights)
    try:
        state = entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # URLError is an OSError
        raise ConfigurationError(
            f"Expected to download {entry.url}, but got {type(error).__name__}: {error}. Download it elsewhere "
            "and pass the file as `--model.weights path/to/file.pth`."
        ) from error
    return Weights(state, f"torchvision's {entry}", torchvision_preprocessing(name, weights))
