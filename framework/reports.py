"""What a run tells its user besides warnings: which weights were loaded, what is new."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from lightning_utilities.core.rank_zero import rank_zero_only

logger = logging.getLogger("framework")


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment, not to what it was when this module was imported."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


if not logger.handlers:  # a user who has set the logger up keeps it so
    logger.addHandler(_StandardError())
    logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def report(text: str) -> None:
    """Show a text, once however many processes there are: a record of the logger ``framework``, on standard error."""
    if getattr(rank_zero_only, "rank", 0) in (0, None):  # not set where Lightning is not imported
        logger.info(text)
