"""Weight arithmetic on checkpoints: interpolation (WiSE-FT), uniform and greedy soups.

Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903 (WiSE-FT); Wortsman et al.,
"Model soups", ICML 2022, arXiv:2203.05482.

The functions on state dicts come first; those on checkpoints make checkpoints like any other, without what would
continue a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as L
import torch
from torch import Tensor

from framework.checkpoints import AtomicCheckpointIO
from framework.errors import ConfigurationError
from framework.modules.members import Checkpoint, trained_on

State = Mapping[str, Tensor]

# what makes a network another one although its weights may have the same names and shapes
ARCHITECTURE = ("backbone", "backbone_options", "bottleneck_features", "bottleneck_normalization")
SHARED = ("backbone.", "bottleneck.")  # what two tasks with heads of their own have in common
HEAD = "head."


# ---------------------------------------------------------------------- state dicts
def interpolate(first: State, second: State, alpha: float) -> dict[str, Tensor]:
    """``(1 - alpha) first + alpha second``, entry by entry; the end points exactly, bit for bit.

    Computed in float64 and rounded once; entries that are equal in both stay as they are. Integers and booleans count
    something (batches seen by a batch norm) or point somewhere, and have no middle: they are those of the nearer end
    point, of the first at 0.5.

    Args:
        first, second: state dicts with the same names, shapes and dtypes.
        alpha: in [0, 1].

    Raises:
        ConfigurationError: an ``alpha`` outside, or entries that differ, of which the first is named.

    >>> interpolate({"weight": torch.tensor([0.0, 1.0])}, {"weight": torch.tensor([1.0, 3.0])}, 0.25)
    {'weight': tensor([0.2500, 1.5000])}
    """
    check_alpha(alpha)
    check_states([first, second])
    if alpha in (0, 1):
        return {name: value.clone() for name, value in (second if alpha else first).items()}

    def between(one: Tensor, other: Tensor) -> Tensor:
        if not one.is_floating_point():
            return (one if alpha <= 0.5 else other).clone()
        mixed = (1 - alpha) * one.double() + alpha * other.double()
        return torch.where(one == other, one, mixed.to(one.dtype))

    return {name: between(value, second[name]) for name, value in first.items()}


def check_alpha(alpha: float) -> None:
    """Refuse a coefficient outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ConfigurationError(f"Expected `--alphas` to be from 0 to 1, but got {alpha}.")


def average(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of state dicts, entry by entry; of identical ones it is that one, bit for bit.

    Accumulated in float64 and rounded once. Integers and booleans are those of the first.

    Args:
        states: one or more, with the same names, shapes and dtypes.

    Raises:
        ConfigurationError: no states, or entries that differ, of which the first is named.

    >>> average([{"weight": torch.tensor([0.0, 1.0])}, {"weight": torch.tensor([1.0, 3.0])}])
    {'weight': tensor([0.5000, 2.0000])}
    """
    if not states:
        raise ConfigurationError("Expected one checkpoint or more to average, but got none.")
    check_states(states)
    mean: dict[str, Tensor] = {}
    for name, value in states[0].items():
        if not value.is_floating_point():
            mean[name] = value.clone()
            continue
        total, equal = torch.zeros_like(value, dtype=torch.float64), torch.ones_like(value, dtype=torch.bool)
        for state in states:
            total += state[name]
            equal &= state[name] == value
        mean[name] = torch.where(equal, value, (total / len(states)).to(value.dtype))
    return mean


class Soup(NamedTuple):
    """What a greedy soup is made of.

    Attributes:
        state: the mean of the ingredients.
        ingredients: their indices, in the order in which they were added.
        accuracy: of the soup, on held-out data.
        trials: what was tried, in order: the index, and the accuracy of the soup with it.
    """

    state: dict[str, Tensor]
    ingredients: list[int]
    accuracy: float
    trials: list[tuple[int, float]]


def greedy_soup(
    states: Sequence[State],
    accuracies: Sequence[float],
    evaluate: Callable[[dict[str, Tensor]], float],
) -> Soup:
    """The greedy soup (Wortsman et al. 2022, recipe 1).

    In the order of their own accuracies, best first, each is added to the soup and stays if the soup's accuracy does
    not fall. The best one alone is the first soup, so that the result is at least as good on these data.

    Args:
        states: the candidates, with the same names, shapes and dtypes.
        accuracies: of each alone, on held-out data; of equal ones the earlier comes first.
        evaluate: accuracy of a state dict on the same data.
    """
    check_states(states)
    order = sorted(range(len(states)), key=lambda index: -accuracies[index])
    soup, best = [order[0]], accuracies[order[0]]
    trials = [(order[0], best)]
    for index in order[1:]:
        accuracy = evaluate(average([states[i] for i in (*soup, index)]))
        trials.append((index, accuracy))
        if accuracy >= best:
            soup, best = [*soup, index], accuracy
    return Soup(average([states[i] for i in soup]), soup, best, trials)


def check_states(states: Sequence[State], names: Sequence[str] = ()) -> None:
    """Refuse state dicts whose names, shapes or dtypes differ.

    Args:
        states: to compare with the first.
        names: of each, for the message.
    """
    called = [f"'{name}'" for name in names] or [f"number {index + 1}" for index in range(len(states))]
    for state, name in zip(states[1:], called[1:], strict=True):
        for here, there, holder, other in ((states[0], state, called[0], name), (state, states[0], name, called[0])):
            missing = next((key for key in here if key not in there), None)
            if missing is not None:
                raise ConfigurationError(
                    f"Expected checkpoints of the same network, but {other} has no '{missing}', which {holder} has."
                )
        for key, value in states[0].items():
            for what, one, another in (
                ("shape", tuple(value.shape), tuple(state[key].shape)),
                ("dtype", value.dtype, state[key].dtype),
            ):
                if one != another:
                    raise ConfigurationError(
                        f"Expected checkpoints of the same network, but '{key}' has the {what} {one} in {called[0]} "
                        f"and {another} in {name}."
                    )


# ---------------------------------------------------------------------- checkpoints
def check_checkpoints(checkpoints: Sequence[Checkpoint], files: Sequence[str], heads: bool = True) -> None:
    """Refuse checkpoints that are not of one network: another class of module, other classes, other weights.

    Args:
        checkpoints: to compare with the first.
        files: their names, for the message.
        heads: compare the classes and all weights; otherwise only what two tasks share, backbone and bottleneck.
    """
    first = checkpoints[0]
    for checkpoint, file in zip(checkpoints[1:], files[1:], strict=True):
        for what, of in (("class of module", class_of), *((key, _hyperparameter(key)) for key in ARCHITECTURE)):
            _check(what, of(first), of(checkpoint), files[0], file)
        if heads and (different := different_classes(first, checkpoint)):
            _check(*different, files[0], file)
        one, other = trained_on(first), trained_on(checkpoint)
        if one is not None and other is not None:
            _check("mean and std of the images", one[1:], other[1:], files[0], file)
    states = [checkpoint["state_dict"] for checkpoint in checkpoints]
    check_states(states if heads else [shared(state) for state in states], files)


def different_classes(first: Checkpoint, second: Checkpoint) -> tuple[str, Any, Any] | None:
    """The first difference of the classes of two checkpoints: what, here, there. Names are compared where both have
    them."""
    one, other = (int(checkpoint["hyper_parameters"]["num_classes"]) for checkpoint in (first, second))
    if one != other:
        return "number of classes", one, other
    names, others = first.get("class_names"), second.get("class_names")
    for index, (name, other_name) in enumerate(zip(names or [], others or [], strict=False)):
        if name != other_name:
            return f"class {index}", name, other_name
    return None


def shared(state: State) -> dict[str, Tensor]:
    """What two tasks with heads of their own have in common."""
    return {name: value for name, value in state.items() if name.startswith(SHARED)}


def class_of(checkpoint: Checkpoint) -> str:
    """Name of the class that a checkpoint is of; the path before it differs between a run from the shell and one from
    Python."""
    return str(checkpoint["hyper_parameters"].get("_class_path", "a class without a name")).rsplit(".", 1)[-1]


def _hyperparameter(key: str) -> Callable[[Checkpoint], Any]:
    return lambda checkpoint: checkpoint["hyper_parameters"].get(key) or None


def _check(what: str, one: Any, other: Any, file: str, other_file: str) -> None:
    if one != other:
        raise ConfigurationError(
            f"Expected checkpoints of the same network and classes, but the {what} is {one!r} in '{file}' and "
            f"{other!r} in '{other_file}'."
        )


def fused(template: Checkpoint, state: State, provenance: dict[str, Any]) -> Checkpoint:
    """A checkpoint of new weights: everything else is the template's, but for what would continue its run.

    Args:
        template: the checkpoint whose class, hyperparameters, classes and data it keeps.
        state: its weights.
        provenance: plain values, kept under "fusion".
    """
    dropped = {"loops", "callbacks", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state"}
    kept = {key: value for key, value in template.items() if key not in dropped}
    return {**kept, "callbacks": {}, "state_dict": dict(state), "fusion": provenance}


def checkpoint_of(module: L.LightningModule, templates: Sequence[Checkpoint], provenance: dict[str, Any]) -> Checkpoint:
    """A checkpoint of a module that no Trainer has trained, with the data of the templates if theirs are the same."""
    first = templates[0]
    data = [key for key in first if key.startswith("datamodule") or _is_split(first[key])]
    same = all(template.get(key) == first[key] for template in templates for key in data if _is_split(first[key]))
    checkpoint: Checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "callbacks": {},
        "state_dict": module.state_dict(),
        module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams),
        **{key: first[key] for key in data if same or not _is_split(first[key])},
        "fusion": provenance,
    }
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _is_split(value: Any) -> bool:
    return isinstance(value, dict) and "split" in value


def write_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write it in one step, and nothing over another file.

    Raises:
        ConfigurationError: there is a file already.
    """
    if path.exists():
        raise ConfigurationError(f"Expected a new file, but '{path}' exists.")
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
