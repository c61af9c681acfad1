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
