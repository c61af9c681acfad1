"""Weights on their way into a backbone: what is read from a file, what is loaded, what is left aside."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from framework.errors import ConfigurationError
from framework.networks.preprocessing import Preprocessing
from framework.reports import report

StateDict = OrderedDict[str, Tensor]

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
ROLES = ("weight", "bias", "running_mean", "running_var")  # vectors of one shape, told apart by their names' ends
COUNTER = "num_batches_tracked"


class Weights(NamedTuple):
    """Weights that are to be loaded.

    Attributes:
        state: the backbone's entries, and its classifier's if there are any.
        what: where they are from, for messages.
        preprocessing: what they expect, where the file says so.
        head: the linear layer right behind the backbone, where the file is a checkpoint of this framework.
        outside: entries of the file that do not belong to the backbone.
    """

    state: StateDict
    what: str
    preprocessing: Preprocessing | None = None
    head: Mapping[str, Tensor] = {}
    outside: tuple[str, ...] = ()


def is_path(weights: str) -> bool:
    """Whether ``weights`` is meant as a file, not as the name of published weights."""
    return Path(weights).suffix in SUFFIXES or "/" in weights or "\\" in weights


def read_weights(path: Path) -> Weights:
    """Read a file with a state dict, plain or under "state_dict" or "model".

    A prefix ``module.`` is stripped. Of a checkpoint of this framework, the entries under ``backbone.`` are taken.

    Raises:
        ConfigurationError: there is no file, it cannot be read, or it holds other things.
    """
    if not path.is_file():
        raise ConfigurationError(f"Expected `--model.weights` to be an existing file, but found none at {str(path)!r}.")
    try:
        content = _load_file(path)
    except Exception as error:  # a broken file can break the loader in any way
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"Expected `--model.weights` {str(path)!r} to hold a state dict of plain tensors, "
            f"but could not read it: {type(error).__name__}: {reason}"
        ) from error
    described = content.get("preprocessing") if isinstance(content, dict) else None
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
    whole = _below(state, "module.")
    state = _below(whole, "backbone.")
    outside: tuple[str, ...] = ()
    head: dict[str, Tensor] = {}
    if state is not whole:
        outside = tuple(key for key in whole if not key.startswith("backbone."))
        if not any(key.startswith("bottleneck.") for key in whole):  # behind one, the head sees other features
            head = {key: whole[f"head.{key}"] for key in ("weight", "bias") if f"head.{key}" in whole}
    preprocessing = None if described is None else Preprocessing.of(described, repr(str(path)))
    return Weights(state, f"'{path}'", preprocessing, head, outside)


def _load_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # comes with timm

        return load_file(path)
    return torch.load(path, weights_only=True, map_location="cpu")


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


# ---------------------------------------------------------------------- into the backbone
def load_weights(
    backbone: nn.Module,
    name: str,
    weights: Weights,
    *,
    classifier: Sequence[str] = (),
    linear: str | None = None,
    by_order: bool = False,
) -> dict[str, Tensor] | None:
    """Load every entry of the backbone, and report what was loaded and what was not.

    Position embeddings of a vision transformer are resized to the backbone's number of patches.

    Args:
        backbone: a network without its classifier, with ``num_features`` ``C``.
        name: of the backbone, for messages.
        weights: what is loaded.
        classifier: prefixes of the entries that belong to the network's classifier: they are left aside.
        linear: name of the classifier, if it is one linear layer on the backbone's features.
        by_order: match tensors by their position instead of their names, see :func:`match_by_order`.

    Returns:
        "weight" ``[Ks, C]`` and "bias" ``[Ks]`` of the classifier that the weights had, if it is linear.

    Raises:
        ConfigurationError: an entry is missing, unexpected or of another shape.
    """
    what = f"{name!r} from `--model.weights` {weights.what}"
    reference: StateDict = OrderedDict(backbone.state_dict())
    num_features = int(backbone.num_features)  # type: ignore[arg-type]
    state, resized = _resize_position_embedding(backbone, _renamed(weights.state), reference)
    if by_order:
        matched = match_by_order(state, reference, what, num_features)
        kept = OrderedDict((ours, state[theirs]) for ours, theirs in matched.items())
        aside = [key for key in _counted(state) if key not in set(matched.values())]
        source = _linear_classifier([state[key] for key in aside], num_features)
    else:
        aside = [key for key in state if key.startswith(tuple(classifier))] if classifier else []
        kept = OrderedDict((key, value) for key, value in state.items() if key not in set(aside))
        last = [state.get(f"{linear}.weight"), state.get(f"{linear}.bias")] if linear else []
        source = _linear_classifier([value for value in last if value is not None], num_features)
    # MNASNet refuses a state dict without a version, which plain dicts have lost
    kept._metadata = {"": {"version": 2}, **getattr(weights.state, "_metadata", {})}  # type: ignore[attr-defined]
    if by_order:
        backbone.load_state_dict(kept, strict=False)
    else:
        _load_by_name(backbone, kept, reference, state, what)
    _report(name, weights, state, kept, reference, aside, by_order, resized)
    return source or _linear_classifier(list(weights.head.values()), num_features)


def _renamed(state: StateDict) -> StateDict:
    """Published DenseNets have "norm.1" where the modules have "norm1"."""
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
    return OrderedDict((pattern.sub(r"\1\2", key), value) for key, value in state.items())


def _counted(state: Mapping[str, Tensor]) -> list[str]:
    """The keys, without batch norm's counter of batches: it says nothing about the network, and old files have none."""
    return [key for key in state if key.rpartition(".")[2] != COUNTER]


def match_by_order(
    state: Mapping[str, Tensor], reference: Mapping[str, Tensor], what: str, num_features: int | None = None
) -> dict[str, str]:
    """Pair the entries of two state dicts by their position; shapes must agree one by one.

    Args:
        state: of a file, with names of its own.
        reference: of the network.
        what: network and file, for messages.
        num_features: ``C``; a classifier ``[Ks, C]``, ``[Ks]`` may then follow in the file.

    Returns:
        For each of the network's names the file's. ``num_batches_tracked`` is in neither.

    Raises:
        ConfigurationError: the first disagreement: another shape, or names that end in different ones of ``weight``,
            ``bias``, ``running_mean`` and ``running_var``, which all have one shape in a batch norm.
    """
    ours, theirs = _counted(reference), _counted(state)

    def refuse(reason: str) -> ConfigurationError:
        return ConfigurationError(f"Expected the tensors of {what} in the network's order, but {reason}.")

    for position, (our, their) in enumerate(zip(ours, theirs, strict=False), start=1):
        ends = our.rpartition(".")[2], their.rpartition(".")[2]
        contradictory = ends[0] != ends[1] and set(ends) <= set(ROLES)
        if reference[our].shape != state[their].shape or contradictory:
            raise refuse(
                f"tensor {position} of {len(ours)} is {their} {tuple(state[their].shape)} in the file and {our} "
                f"{tuple(reference[our].shape)} in the network"
            )
    if len(theirs) < len(ours):
        missing = ours[len(theirs)]
        raise refuse(
            f"the file ends after {len(theirs)} of {len(ours)}: the next is {missing} "
            f"{tuple(reference[missing].shape)} in the network"
        )
    rest = [state[key] for key in theirs[len(ours) :]]
    if rest and (num_features is None or len(rest) > 2 or _linear_classifier(rest, num_features) is None):
        after = theirs[len(ours)]
        expected = "" if num_features is None else f", where a classifier [classes, {num_features}] may follow"
        raise refuse(f"the file goes on after all {len(ours)} with {after} {tuple(state[after].shape)}{expected}")
    return dict(zip(ours, theirs, strict=False))


def _linear_classifier(entries: Sequence[Tensor], num_features: int) -> dict[str, Tensor] | None:
    """A linear layer on the features out of weight and bias, or its weight alone."""
    if not entries:
        return None
    weight = entries[0].detach().float().clone()
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):  # timm has some as convolutions of the pooled features
        weight = weight.flatten(1)
    if weight.ndim != 2 or weight.shape[1] != num_features:
        return None
    bias = entries[1].detach().float().clone() if len(entries) > 1 else torch.zeros(len(weight))
    return {"weight": weight, "bias": bias} if bias.shape == (len(weight),) else None


def _load_by_name(backbone: nn.Module, kept: StateDict, reference: StateDict, state: StateDict, what: str) -> None:
    shapes = {key: tuple(value.shape) for key, value in reference.items()}
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
    if not complaints:
        return
    try:
        match_by_order(state, reference, what, int(backbone.num_features))  # type: ignore[arg-type]
        hint = " The tensors fit by their order, though: `--model.weights_by_order true` takes them so."
    except ConfigurationError:
        hint = ""
    raise ConfigurationError(f"Expected weights that fit {what}, but got entries {'; '.join(complaints)}.{hint}")


def _resize_position_embedding(
    backbone: nn.Module, state: StateDict, reference: StateDict
) -> tuple[StateDict, str | None]:
    """The state with the position embedding of a vision transformer brought to the backbone's number of patches."""
    key = next((key for key in ("encoder.pos_embedding", "pos_embed") if key in state and key in reference), None)
    if key is None or state[key].shape == reference[key].shape or state[key].ndim != 3:
        return state, None
    old, new = state[key], reference[key]
    if isinstance(backbone, torchvision.models.VisionTransformer):
        try:
            state = interpolate_embeddings(backbone.image_size, backbone.patch_size, OrderedDict(state))
        except ValueError:  # its patches are no square
            return state, None
    else:
        grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
        extra = 0 if grid is None else new.shape[1] - grid[0] * grid[1]  # class and distillation token
        patches = old.shape[1] - extra
        if grid is None or math.isqrt(max(patches, 0)) ** 2 != patches or old.shape[2] != new.shape[2]:
            return state, None
        from timm.layers import resample_abs_pos_embed  # type: ignore[attr-defined]

        state = OrderedDict(state)
        state[key] = resample_abs_pos_embed(old, list(grid), num_prefix_tokens=extra)
    return state, f"{key} resized from {old.shape[1]} to {new.shape[1]} tokens"


def _report(
    name: str,
    weights: Weights,
    state: StateDict,
    kept: StateDict,
    reference: StateDict,
    aside: list[str],
    by_order: bool,
    resized: str | None,
) -> None:
    left, built = [], [key for key in reference if key not in kept]
    if aside:
        left.append(f"{_shorten(aside)} (the classifier)")
    if weights.outside:
        left.append(f"{len(weights.outside)} outside the backbone ({_shorten(weights.outside)})")
    if by_order and len(state) > len(_counted(state)):
        left.append(f"{len(state) - len(_counted(state))} {COUNTER}")
    text = (
        f"Weights of {name!r}: {len(kept)} of the {len(state) + len(weights.outside)} tensors in {weights.what} loaded "
        f"by their {'order' if by_order else 'names'}."
    )
    if left:
        text += f" Left aside: {'; '.join(left)}."
    if built:  # whatever else is missing is an error
        text += f" As built: {len(built)} {COUNTER}."
    report(text + (f" Changed: {resized}." if resized else ""))


def _shorten(keys: Sequence[str], shown: int = 3) -> str:
    return ", ".join(keys[:shown]) + (", …" if len(keys) > shown else "")
