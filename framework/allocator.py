"""The C library's memory, kept by the process instead of given back after every step."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator

# of glibc's malloc.h; the values are C ints
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER = -1  # no amount of free memory at the end of the heap is given back
PAD = 256 * 2**20  # bytes that the heap grows by at a time

OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc", "libhoard", "tbbmalloc")
CHOSEN_BY_USER = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Make glibc's ``malloc`` keep what is freed, for the rest of the process.

    By default it takes each tensor of more than some megabytes from the system and gives it back when it is freed. On a
    CPU, a training step then takes the same memory again, and the system clears it page by page: a twentieth of the
    step and more. Does in a running process what ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`` and a large
    ``MALLOC_TOP_PAD_`` do in its environment. The cost: the process stays as large as it has ever been, until it ends.

    Does nothing where the C library is another one, where jemalloc, tcmalloc or the like takes its place, or where the
    environment sets one of ``MALLOC_…`` or a ``glibc.malloc`` tunable: then the user has chosen.

    Returns:
        Whether it has changed anything.
    """
    if platform.libc_ver()[0] != "glibc" or _chosen_by_user() or _has_other_allocator():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, PAD))
    done = [mallopt(option, value) for option, value in settings]
    return done == [1, 1, 1]


def _chosen_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(name in os.environ for name in CHOSEN_BY_USER)


def _has_other_allocator() -> bool:
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux: what was asked to be loaded
        loaded = os.environ.get("LD_PRELOAD", "")
    return any(name in loaded for name in OTHER_ALLOCATORS)


class KeepMemory(Callback):
    """:func:`keep_freed_memory` where a ``fit`` begins on the CPU; in every process of a ddp run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the first batch is loaded."""
        if stage == "fit" and isinstance(trainer.accelerator, CPUAccelerator):
            keep_freed_memory()
