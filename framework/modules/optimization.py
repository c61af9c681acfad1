"""Optimizers and schedules by their names, checked before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch

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
