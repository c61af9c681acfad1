"""Optimizers and schedules by their names, checked before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from framework.errors import ConfigurationError, did_you_mean
from framework.functional.schedules import cosine_with_warmup, inverse_decay, step_decay

Schedule = Literal["constant", "inverse_decay", "cosine", "step"]

SCHEDULES: dict[str, Callable[..., float]] = {
    "inverse_decay": inverse_decay,
    "cosine": cosine_with_warmup,
    "step": step_decay,
}


def optimizer_class_and_arguments(
    name: str, weight_decay: float, options: dict[str, Any] | None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    by_lower_case = {key.lower(): key for key in known}
    if name.lower() not in by_lower_case:
        raise ConfigurationError(
            f"Expected `--model.optimizer` to be an optimizer of torch.optim, but got {name!r}. "
            f"{did_you_mean(name, known)}"
        )
    cls = known[by_lower_case[name.lower()]]
    arguments: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if cls is torch.optim.SGD else {}
    arguments |= {"weight_decay": weight_decay} | (options or {})
    accepted = set(inspect.signature(cls.__init__).parameters) - {"self", "params", "lr"}
    for key in arguments:
        if key not in accepted:
            flag = f"--model.{key}" if key == "weight_decay" else "--model.optimizer_options"
            raise ConfigurationError(
                f"Expected `{flag}` to be an option of {cls.__name__}, but got {key!r}. {did_you_mean(key, accepted)}"
            )
    try:
        cls([torch.zeros(1, requires_grad=True)], **({"lr": 0.1} | arguments))
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"Expected `--model.optimizer_options` that {cls.__name__} takes, but got {arguments}: {error}"
        ) from error
    return cls, arguments


FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
FUSED_DEVICES = ("cpu", "cuda")
FUSED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fused_by_default(cls: type[torch.optim.Optimizer], arguments: dict[str, Any], groups: list[dict[str, Any]]) -> bool:
    """Whether an optimizer's step may be one kernel for all parameters, unless its ``arguments`` ask for another way.

    So where the class has such a kernel for the device and the dtype of every parameter. ``{fused: false}``, or an
    option that excludes it (``foreach``, ``differentiable``), wins.
    """
    if cls not in FUSED or any(name in arguments for name in ("fused", "foreach", "differentiable")):
        return False
    if arguments.get("dampening"):  # see `begin_momentum`
        return False
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.device.type in FUSED_DEVICES and p.dtype in FUSED_DTYPES for p in parameters)


def keep_way_of_stepping(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer step as it was built to, also after it has loaded the state of one that steps otherwise.

    PyTorch restores ``fused`` and ``foreach`` with a state, and leaves each tensor in the layout that it was saved in.
    The fused kernels of the CPU take for granted that all tensors of a parameter lie in memory as the parameter does,
    and compute nonsense without a word where they do not, as after ``--model.channels_last`` has changed.
    """
    names = ("fused", "foreach")
    ways: list[dict[str, Any]] = [
        {key: group[key] for key in names if key in group} for group in optimizer.param_groups
    ]

    def restore(loaded: torch.optim.Optimizer) -> None:
        for group, way in zip(loaded.param_groups, ways, strict=True):
            group.update(way)
            for parameter in group["params"]:
                state = loaded.state.get(parameter, {})
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        state[name] = _as_laid_out(value, parameter, bool(way.get("fused")))

    optimizer.register_load_state_dict_post_hook(restore)


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters of a fused SGD that have a gradient for the first time a momentum of 0, which is what they start
    from anyway; to be called between the gradients and the step.

    torch's own start takes a whole group at once: it fails where a parameter gets its first gradient later than others,
    as what is unfrozen, or one of the heads of MCD, does.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group.get("fused") and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def _as_laid_out(value: Tensor, parameter: Tensor, fused: bool) -> Tensor:
    if value.shape == parameter.shape and value.stride() != parameter.stride():
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    if value.dim() == 0 and fused:  # Adam's step, which other ways keep on the CPU
        return value.to(parameter.device)
    return value


def checked_schedule_options(schedule: str, options: dict[str, Any] | None) -> dict[str, Any]:
    defaults: dict[str, dict[str, Any]] = {
        "constant": {},
        "inverse_decay": {"gamma": 1e-3, "beta": 0.75},
        "cosine": {"warmup": 0, "minimum": 0.0},
        "step": {"milestones": None, "factor": 0.1},
    }
    if schedule not in defaults:
        raise ConfigurationError(
            f"Expected `--model.schedule` to be one of {', '.join(defaults)}, but got {schedule!r}. "
            f"{did_you_mean(schedule, defaults)}"
        )
    known = defaults[schedule]
    for key in options or {}:
        if key not in known:
            raise ConfigurationError(
                f"Expected `--model.schedule_options` to be options of {schedule!r} ({', '.join(known) or 'none'}), "
                f"but got {key!r}."
            )
    merged = known | (options or {})
    if schedule == "step" and not merged["milestones"]:
        raise ConfigurationError(
            "Expected `--model.schedule_options.milestones` to list optimizer steps for `--model.schedule step`, "
            "but got none."
        )
    if schedule in SCHEDULES:
        planned = {"total": 2**62} if schedule == "cosine" else {}  # the real number is known when training starts
        try:
            SCHEDULES[schedule](0, **merged, **planned)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"Expected `--model.schedule_options` that {schedule!r} takes, but got {merged}: {error}"
            ) from error
    return merged
