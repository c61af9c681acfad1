"""Workers of the loaders, threads or processes: they end with the run, and not before it."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

Workers = Literal["threads", "processes"]
AHEAD = 2  # batches for each thread, as torch's for each process
T = TypeVar("T")


class ThreadedLoader(DataLoader[T]):
    """A loader whose batches are made by threads, some of them ahead of the run.

    Decoding and resizing leave Python's lock to others, and a batch need not be handed from process to process. The
    dataset makes whole batches (``__getitems__``) and draws no numbers from generators that are the process's. An error
    in a batch is raised where that batch is due. Threads begin with the first batch of an epoch, and end with it or
    where the iterator is closed.

    Args:
        threads: how many; at least 1.
        options: those of ``DataLoader``, but for what is said of processes.
    """

    def __init__(self, *arguments: Any, threads: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.threads = threads

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        """The batches, in order."""
        fetch, collate = self.dataset.__getitems__, self.collate_fn  # type: ignore[attr-defined]
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="images")
        ahead: deque[Future[Any]] = deque()
        try:
            for indices in self.batch_sampler or ():
                ahead.append(pool.submit(fetch, indices))
                if len(ahead) > AHEAD * self.threads:
                    yield self._pinned(collate(ahead.popleft().result()))
            while ahead:
                yield self._pinned(collate(ahead.popleft().result()))
        finally:
            pool.shutdown(cancel_futures=True)

    def _pinned(self, batch: T) -> T:
        pinned: T = pin_memory(batch) if self.pin_memory else batch  # type: ignore[no-untyped-call]
        return pinned


def image_loader(dataset: Any, num_workers: int, workers: Workers, **options: Any) -> DataLoader[Any]:
    """A loader of image batches.

    Args:
        dataset: makes whole batches.
        num_workers: how many threads or processes; with 0 the run makes the batches itself, one by one.
        workers: which of them.
        options: those of ``DataLoader``.
    """
    if workers == "threads" and num_workers:
        del options["persistent_workers"]
        return ThreadedLoader(dataset, threads=num_workers, **options)
    persistent = options.pop("persistent_workers") and num_workers > 0
    return DataLoader(
        dataset,
        num_workers=num_workers,
        persistent_workers=persistent,
        worker_init_fn=leave_stopping_to_the_run,
        **options,
    )


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
