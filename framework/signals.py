"""Stopping a command in order: what Ctrl-C and SIGTERM do."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_in_order(subcommand: str) -> Iterator[list[int]]:
    """Let Ctrl-C finish the batch and save, as SIGTERM does in ``fit``; a second one stops at once.

    Before the first batch, and in the other commands, there is nothing to save: both signals stop at once. Yields the
    list of the SIGINTs received.
    """
    received: list[int] = []
    process = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a loader's worker, to which the terminal sends Ctrl-C too
            return
        received.append(number)
        lightning_stops = signal.getsignal(signal.SIGTERM) is not terminate and subcommand == "fit"
        if len(received) > 1 or not lightning_stops:
            raise KeyboardInterrupt
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("\nStopping after this batch, then saving last.ckpt (Ctrl-C again stops at once) …", file=sys.stderr)
        os.kill(process, signal.SIGTERM)

    def terminate(number: int, frame: Any) -> None:
        # Lightning's handler for SIGTERM calls this one too: in `fit` it then stops after the batch
        if os.getpid() == process and (subcommand != "fit" or signal.getsignal(number) is terminate):
            raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield received
        return
    earlier = {
        number: signal.signal(number, f) for number, f in ((signal.SIGINT, interrupt), (signal.SIGTERM, terminate))
    }
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
