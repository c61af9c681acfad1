"""A backbone as a sequence of stages, from its input to its output: what is unfrozen, decayed or compared in turn."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

LARGE = 0.8  # a child that holds more than this share of the parameters is looked into
LEAST = 4  # a backbone has at least that many stages, if it has that many layers


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

    These are its children with parameters, in the order of registration. A child that holds most of the parameters (as
    ``features`` or ``encoder`` of torchvision's networks, ``blocks`` of timm's) is replaced by its own children, and so
    is the largest one while there are fewer than four. What holds vectors only (a norm after the stem or at the end)
    belongs to the stage before it, and a parameter of a looked-into module itself (a class token, a position
    embedding) to the stage that follows it, which is the first for one of the backbone itself.
    """
    total = sum(parameter.numel() for parameter in backbone.parameters())
    parts: list[tuple[str, nn.Module | nn.Parameter]] = _children("", backbone)
    while True:
        sizes = [_size(part) for _, part in parts]
        order = sorted(range(len(parts)), key=lambda i: -sizes[i])
        inside = {i: _children(*parts[i]) for i in order if isinstance(parts[i][1], nn.Module)}  # type: ignore[arg-type]
        weighty = sum(_is_weighty(part) for _, part in parts)
        chosen = next(
            (
                i
                for i in order
                if i in inside
                and sum(_is_weighty(part) for _, part in inside[i]) > 0
                and (sizes[i] > LARGE * total or weighty < LEAST)
            ),
            None,
        )
        if chosen is None:
            break
        parts[chosen : chosen + 1] = inside[chosen]
    return _grouped(parts)


def _children(name: str, module: nn.Module) -> list[tuple[str, nn.Module | nn.Parameter]]:
    prefix = f"{name}." if name else ""
    own: list[tuple[str, nn.Module | nn.Parameter]] = [
        (prefix + key, parameter) for key, parameter in module.named_parameters(recurse=False)
    ]
    return own + [(prefix + key, child) for key, child in module.named_children() if _size(child)]


def _size(part: nn.Module | nn.Parameter) -> int:
    return part.numel() if isinstance(part, nn.Parameter) else sum(p.numel() for p in part.parameters())


def _is_weighty(part: nn.Module | nn.Parameter) -> bool:
    return isinstance(part, nn.Module) and any(parameter.dim() > 1 for parameter in part.parameters())


def _grouped(parts: list[tuple[str, nn.Module | nn.Parameter]]) -> list[Stage]:
    groups: list[list[tuple[str, nn.Module | nn.Parameter]]] = []
    waiting: list[tuple[str, nn.Module | nn.Parameter]] = []  # for the next stage
    for name, part in parts:
        if isinstance(part, nn.Parameter):
            waiting.append((name, part))
        elif _is_weighty(part) or not groups:
            groups.append([*waiting, (name, part)])
            waiting = []
        else:
            groups[-1].append((name, part))
    if waiting:
        groups[-1] += waiting
    stages, seen = [], set[int]()
    for group in groups:
        modules = tuple(part for _, part in group if isinstance(part, nn.Module))
        parameters = []
        for _, part in group:
            for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                if id(parameter) not in seen:  # shared with an earlier stage
                    seen.add(id(parameter))
                    parameters.append(parameter)
        name = max(group, key=lambda item: _size(item[1]))[0]
        stages.append(Stage(name, modules, tuple(parameters)))
    return stages
