"""Worker processes of the loaders: they end with the run, and not before it."""

from __future__ import annotations

import atexit
import multiprocessing
import signal


def leave_stopping_to_the_run(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a loader's worker: terminals and schedulers send them to every process of the run,
    which would lose its workers before it has finished the batch and saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    # multiprocessing ends what is left with SIGTERM and waits for it: for ever, since the workers above ignore that.
    # There are some left where a run has ended in an error.
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
