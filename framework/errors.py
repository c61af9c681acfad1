"""The one error that a user's mistake ends in, and the near names that such a message offers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigurationError(ValueError):
    """What the user asked for cannot be done.

    The message says what was expected, what came and which flag to turn. The command line prints it without a
    traceback; in Python it is an ordinary ``ValueError``.
    """


def did_you_mean(name: str, known: Iterable[str], limit: int = 5) -> str:
    """The known names nearest to ``name``, as the end of an error message.

    >>> did_you_mean("resnet19", ["resnet18", "vgg16"])
    "Did you mean 'resnet18'?"
    >>> did_you_mean("x", ["resnet18", "vgg16"])
    "Known: 'resnet18', 'vgg16'."
    """
    names = sorted(set(known))
    by_lower_case = {known_name.lower(): known_name for known_name in names}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=limit, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(by_lower_case[n]) for n in near)}?"
    shown = ", ".join(repr(n) for n in names[:20])
    return f"Known: {shown}{', …' if len(names) > 20 else ''}."


def at_least_zero(flag: str, value: float) -> None:
    """Refuse a negative value."""
    if value < 0:
        raise ConfigurationError(f"Expected `{flag}` to be 0 or more, but got {value}.")


def in_range(flag: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside ``[low, high)``."""
    if not low <= value < high:
        raise ConfigurationError(f"Expected `{flag}` to be at least {low} and below {high}, but got {value}.")
