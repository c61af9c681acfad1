"""Starting a network from a checkpoint of another run: what fits is taken, and what is not is said."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.networks.preprocessing import Preprocessing

Entries = dict[str, Tensor]
FLAG = "--model.init_from"
LORA = (
    " Its low-rank adapters must be merged into the weights first: in Python "
    "`torch.save(framework.networks.lora.merge_adapters(model.backbone).state_dict(), 'merged.pth')`, then "
    "`--model.weights merged.pth`."
)


class Initialization:
    """The parts of a checkpoint, which modules of the same name start from, and the account of what came of each.

    ``backbone`` must fit entirely. ``bottleneck`` is taken if it fits. Every other name is that of a classifier on the
    features: it is taken if it fits *and* the layers before it are the checkpoint's, since behind a new bottleneck its
    weights would mean nothing. Where the checkpoint has batch norms for each domain, the target's are taken.

    Args:
        path: a checkpoint of any module of this framework that has a backbone.

    Attributes:
        class_names: the classes that the checkpoint was trained on, None where it does not say.

    Raises:
        ConfigurationError: a file that cannot be read, or that holds no backbone.
    """

    def __init__(self, path: str) -> None:
        content = _read(path)
        self.path = path
        self.hyperparameters: dict[str, Any] = dict(content.get("hyper_parameters") or {})
        names = content.get("class_names")
        self.class_names: list[str] | None = None if names is None else [str(name) for name in names]
        described = content.get("preprocessing")
        self._preprocessing = None if described is None else Preprocessing.of(described, repr(path))
        entries, self._domain_specific = of_the_target(content["state_dict"])
        self._parts: dict[str, Entries] = {}
        for key, value in entries.items():
            part, _, rest = key.partition(".")
            # the file is mapped into memory, and may be overwritten: what is kept is a copy
            self._parts.setdefault(part, {})[rest] = value if part == "backbone" else value.clone()
        self._taken: dict[str, str] = {}
        self._new: dict[str, str] = {}
        self._fresh: dict[str, Entries] = {}
        self._same_features = True

    # ------------------------------------------------------------------ loading
    def load(self, name: str, module: nn.Module) -> None:
        """Let ``module`` start as the part ``name`` of the checkpoint, or stay as it is.

        A name may come again, for a module that replaces the first one.

        Raises:
            ConfigurationError: ``module`` is the backbone, and does not fit.
        """
        if name == "backbone":
            self._load_backbone(module)
            return
        found, wanted = self._parts.get(name, {}), _state(module)
        for account in (self._taken, self._new, self._fresh):
            account.pop(name, None)
        reason = _difference(found, wanted)
        if name == "bottleneck":
            self._same_features = reason is None
            if not wanted:
                return  # there is none here; the account says if the checkpoint has one
        elif reason is None and not self._same_features:
            reason = "it follows another bottleneck"
        if reason is not None:
            self._new[name] = reason
            return
        if name != "bottleneck":
            self._fresh[name] = {key: value.clone() for key, value in wanted.items()}
        _assign(module, dict(zip(wanted, found.values(), strict=True)))
        self._taken[name] = _count(found)

    def _load_backbone(self, module: nn.Module) -> None:
        found, wanted = self._parts.pop("backbone"), _state(module)
        problems = {
            "missing": [key for key in wanted if key not in found],
            "unexpected": [key for key in found if key not in wanted],
            "of another shape": [
                f"{key} {list(found[key].shape)} instead of {list(wanted[key].shape)}"
                for key in wanted
                if key in found and found[key].shape != wanted[key].shape
            ],
        }
        complaints = [f"{len(keys)} {kind} ({_shortened(keys)})" for kind, keys in problems.items() if keys]
        if complaints:
            wrapped = any("lora_" in key for key in found)
            raise ConfigurationError(
                f"Expected `{FLAG}` to hold the backbone that `--model.backbone` and `--model.backbone_options` name, "
                f"but in '{self.path}', {self._origin()}, are entries {'; '.join(complaints)}."
                + (LORA if wrapped else "")
            )
        _assign(module, found)
        self._taken["backbone"] = _count(found)
        if self._preprocessing is not None:
            module.preprocessing = self._preprocessing  # type: ignore[assignment]
        head = self._parts.get("head", {})
        if list(head) == ["weight", "bias"] and "bottleneck" not in self._parts:  # behind one it sees other features
            object.__setattr__(module, "source_classifier", dict(head))

    # ------------------------------------------------------------------ classes
    def compare_classes(self, names: Sequence[str] | None, parts: Mapping[str, nn.Module]) -> None:
        """Make the classifiers new again where their classes are others than the data's, though as many.

        They become what they were before, as without the checkpoint.

        Args:
            names: the data's classes; None where it does not name them.
            parts: the modules by name.
        """
        if names is None or self.class_names is None or list(names) == self.class_names:
            return
        for name, fresh in self._fresh.items():
            wanted = _state(parts[name])  # may have batch norms for each domain by now
            twins = {key: _without_domain(key) for key in wanted}
            _assign(parts[name], {key: fresh[key if key in fresh else twins[key]] for key in wanted})
            del self._taken[name]
            self._new[name] = f"its classes are {_shortened(self.class_names)}, the data's are {_shortened(names)}"
        self._fresh = {}

    # ------------------------------------------------------------------ the account
    def account(self) -> str:
        """What was taken, what is new and why, and what of the checkpoint was not used."""
        lines = [f"Started from '{self.path}', {self._origin()}."]
        lines += [f"  taken: {', '.join(f'{name} ({count})' for name, count in self._taken.items())}"]
        if self._domain_specific:
            lines.append(f"  of its {self._domain_specific} batch norms for each domain, the target's")
        if self._fresh and self.class_names is None:
            lines.append(f"  it does not name its classes: {' and '.join(self._fresh)} may mean others than the data's")
        lines += [f"  new: {name}, since {reason}" for name, reason in self._new.items()]
        left = [
            f"{name} ({_count(entries)})"
            for name, entries in self._parts.items()
            if name not in self._taken and name not in self._new and not name.startswith("_")
        ]
        lines.append(f"  not used: {', '.join(left) or 'nothing'}")
        return "\n".join(lines)

    def _origin(self) -> str:
        """Which module and backbone the checkpoint is of, by its hyperparameters."""
        cls = str(self.hyperparameters.get("_class_path") or "an unknown class").rsplit(".", 1)[-1]
        text = f"a checkpoint of {cls}"
        if backbone := self.hyperparameters.get("backbone"):
            text += f" with the backbone {backbone!r}"
        if options := self.hyperparameters.get("backbone_options"):
            text += f" and its options {dict(options)}"
        return text


def of_the_target(state: Mapping[str, Tensor]) -> tuple[Entries, int]:
    """The entries with the target's batch norms in the place of domain-specific ones, and how many of these there were.

    A :class:`~framework.networks.DomainSpecificBatchNorm` ``x`` has ``x.source.weight`` and ``x.target.weight``.
    """
    norms = {
        key.removesuffix(".target.running_mean")
        for key in state
        if key.endswith(".target.running_mean") and key.replace(".target.", ".source.") in state
    }
    entries: Entries = {}
    for key, value in state.items():
        above, _, leaf = key.rpartition(".")
        norm, _, domain = above.rpartition(".")
        if norm not in norms:
            entries[key] = value
        elif domain == "target":
            entries[f"{norm}.{leaf}"] = value
    return entries, len(norms)


def _without_domain(key: str) -> str:
    above, _, leaf = key.rpartition(".")
    norm, _, domain = above.rpartition(".")
    return f"{norm}.{leaf}" if domain in ("source", "target") else key


def _read(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigurationError(
            f"Expected `{FLAG}` to be a checkpoint file, but '{path}' is a folder. A run's are in it as "
            "checkpoints/last.ckpt and checkpoints/best.ckpt."
        )
    if not file.is_file():
        raise ConfigurationError(f"Expected `{FLAG}` to be a checkpoint file, but '{path}' does not exist.")
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken file can break the loader in any way
        raise ConfigurationError(
            f"Expected `{FLAG}` to be a checkpoint of this framework, but '{path}' cannot be read as one: "
            f"{type(error).__name__}: {str(error).split('. ')[0].splitlines()[0] if str(error) else ''}"
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not any(str(key).startswith("backbone.") for key in state):
        raise ConfigurationError(
            f"Expected `{FLAG}` to be a checkpoint of this framework with a backbone in it, but '{path}' holds none. "
            "The weights of a network alone are given as `--model.weights`."
        )
    return content


def _state(module: nn.Module) -> Entries:
    return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}


def _assign(module: nn.Module, entries: Entries) -> None:
    state = OrderedDict(entries)
    # the versions by which some modules convert old entries; the names and shapes have just been compared
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(state)


def _difference(found: Entries, wanted: Entries) -> str | None:
    """Why ``found`` cannot be loaded where ``wanted`` is; None if it can.

    The numbers of layers in a Sequential may differ (by a dropout, which has no entries); their order and kinds not.
    """
    if not found and wanted:
        return "the checkpoint has none"
    kinds = [[key.rsplit(".", 1)[-1] for key in entries] for entries in (found, wanted)]
    if kinds[0] != kinds[1]:
        return f"it has other layers: {_shortened(list(found))} in the checkpoint, {_shortened(list(wanted))} here"
    for (there, value), (here, own) in zip(found.items(), wanted.items(), strict=True):
        if value.shape != own.shape:
            other = "" if here == there else f"{here} "
            return f"{there} is {list(value.shape)} in the checkpoint and {other}{list(own.shape)} here"
    return None


def _count(entries: Entries) -> str:
    return f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"


def _shortened(names: Sequence[str], shown: int = 3) -> str:
    return (", ".join(names[:shown]) or "none") + (f", … ({len(names)})" if len(names) > shown else "")
