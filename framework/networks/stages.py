"""A backbone as a sequence of stages, from its input to its output: what is unfrozen, decayed or compared in turn."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

LARGE = 0.9  # a child that holds more than this share of the layers is looked into
LEAST = 4  # a backbone has at least that many stages, if it has that many layers

Part = nn.Module | nn.Parameter
NamedPart = tuple[str, Part]


class Stage(NamedTuple):
    """A part of a backbone.

    Attributes:
        name: of its largest module, as in ``named_modules``.
        modules: the modules that it is made of, in the order of their registration; the last one's output is the
            stage's.
        parameters: all of its parameters.
    """

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...]


def split_stages(backbone: nn.Module) -> list[Stage]:
    """The stages of any backbone, from input to output; every parameter is in exactly one of them.

    These are its children with parameters, in the order of registration. A child that holds most of the layers (as
    ``features`` or ``encoder`` of torchvision's networks, ``blocks`` of timm's) is replaced by its own children, and so
    is the one with most layers while there are fewer than four stages, and a list of modules, which is never called
    itself. What holds vectors only (a norm after the stem or at the end) belongs to the stage before it, and a
    parameter of a looked-into module itself (a class token, a position embedding) to the stage that follows it.

    The order is that of the forward pass in all of torchvision's classifiers and nearly all of timm's; CoaT and Twins,
    for example, register the patch embeddings of all levels first.
    """
    total = _layers(backbone)
    parts = _children("", backbone)
    while (chosen := _to_look_into(parts, total)) is not None:
        parts[chosen : chosen + 1] = _children(*parts[chosen])
    return _grouped(parts)


def _to_look_into(parts: list[NamedPart], total: int) -> int | None:
    """The position of the next part to replace by its children."""
    counts = [_layers(part) for _, part in parts]
    for position in sorted(range(len(parts)), key=lambda position: -counts[position]):
        part = parts[position][1]
        if not isinstance(part, nn.Module) or not any(_layers(child) for _, child in _children("", part)):
            continue
        few = sum(count > 0 for count in counts) < LEAST
        is_list = type(part).forward is nn.Module.forward  # a subclass may have one: DenseNet's block is a ModuleDict
        if is_list or counts[position] > LARGE * total or few:
            return position
    return None


def _children(name: str, part: Part) -> list[NamedPart]:
    """The parameters of a module itself, then its children that hold parameters or running statistics."""
    if isinstance(part, nn.Parameter):
        return []
    prefix = f"{name}." if name else ""
    own: list[NamedPart] = [(prefix + key, parameter) for key, parameter in part.named_parameters(recurse=False)]
    return own + [(prefix + key, child) for key, child in part.named_children() if _is_kept(child)]


def _is_kept(module: nn.Module) -> bool:
    # a batch norm without scale and shift has no parameters, and yet something to freeze
    return any(True for _ in module.parameters()) or any(
        key.rpartition(".")[2] == "running_mean" for key, _ in module.named_buffers()
    )


def _layers(part: Part) -> int:
    """The number of weights that are not vectors; those outside modules do not count."""
    return sum(parameter.dim() > 1 for parameter in part.parameters()) if isinstance(part, nn.Module) else 0


def _size(part: Part) -> int:
    return part.numel() if isinstance(part, nn.Parameter) else sum(p.numel() for p in part.parameters())


def _grouped(parts: list[NamedPart]) -> list[Stage]:
    groups: list[list[NamedPart]] = []
    waiting: list[NamedPart] = []  # for the next stage
    for name, part in parts:
        if _layers(part):
            groups.append([*waiting, (name, part)])
            waiting = []
        elif isinstance(part, nn.Module) and groups and not waiting:
            groups[-1].append((name, part))
        else:
            waiting.append((name, part))
    if groups:
        groups[-1] += waiting
    elif waiting:
        groups.append(waiting)
    stages, seen = [], set[int]()
    for group in groups:
        parameters = []
        for _, part in group:
            for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                if id(parameter) not in seen:  # shared with an earlier stage
                    seen.add(id(parameter))
                    parameters.append(parameter)
        inside = [(name, part) for name, part in group if isinstance(part, nn.Module)]
        name = max(inside or group, key=lambda item: _size(item[1]))[0]
        stages.append(Stage(name, tuple(part for _, part in inside), tuple(parameters)))
    return stages
