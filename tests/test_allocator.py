"""Freed memory is kept: counted in page faults, which a busy machine does not change."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

import framework.allocator as allocator
from framework import Trainer
from framework.allocator import KeepMemory, keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

STEPS = """
import resource, sys, threading
import torch
from framework.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    tensors = [torch.ones(10_000_000) for _ in range(2)]  # 40 MB each, more than glibc ever keeps: 19,531 pages

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):
    before = faults()
    if sys.argv[2] == "thread":
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    else:
        step()
    print(faults() - before)
"""

FIT = """
import resource, sys
import lightning.pytorch as L
import torch
from framework import ImageFolderDataModule, ResidualClassifier, Trainer

class Faults(L.Callback):
    def on_train_batch_start(self, *_):
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def on_train_batch_end(self, *_):
        print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self.before)

if __name__ == "__main__":
    data = ImageFolderDataModule(sys.argv[1], batch_size=48, steps_per_epoch=8, image_size=128, num_workers=0)
    trainer = Trainer(
        keep_memory=sys.argv[2] == "True", max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, limit_val_batches=0, callbacks=[Faults()],
    )
    trainer.fit(ResidualClassifier(2, backbone="resnet8"), data)
"""


def faults(script: str, *arguments: str, **environment: str) -> list[int]:
    """What a process of its own prints, by steps."""
    plain = {key: value for key, value in os.environ.items() if "MALLOC" not in key and key != "LD_PRELOAD"}
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**plain, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [int(line.split()[-1]) for line in run.stdout.splitlines() if line.split()[-1].isdigit()]


@pytest.mark.slow
@glibc
@pytest.mark.parametrize("where", ["main", "thread"])
def test_memory_is_not_taken_again(where: str) -> None:
    """Also by a thread, whose memory glibc has in another place: a prefetching one, or the one that pins."""
    plain, kept = faults(STEPS, "plain", where), faults(STEPS, "keep", where)
    assert min(plain) > 19_000
    assert sum(kept[4:]) < sum(plain[4:]) / 3  # a thread may get an arena that none has had


@pytest.mark.slow
@glibc
def test_as_by_the_environment() -> None:
    environment = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
    assert sum(faults(STEPS, "plain", "main", **environment)[4:]) < 30_000


@pytest.mark.slow
@glibc
def test_a_fit_keeps_its_memory(tmp_path: Path, images: Any) -> None:
    images(tmp_path / "data", ["a", "b"], count=48, size=64)
    plain, kept = (faults(FIT, str(tmp_path / "data"), keep)[-8:] for keep in ("False", "True"))
    assert len(plain) == len(kept) == 8
    assert min(plain[4:]) > 10_000  # tensors of 50 MB, more than glibc ever keeps
    assert sum(kept[4:]) < sum(plain[4:]) / 3


@glibc
@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_MAX_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_what_the_user_has_chosen_stays(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("MALLOC" in name for name in os.environ)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(allocator.ctypes, "CDLL", forbidden)
    assert keep_freed_memory() is False


def forbidden(*_: Any) -> None:
    raise AssertionError("asked the C library")


def test_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", forbidden)
    assert keep_freed_memory() is False


@glibc
@pytest.mark.parametrize("name", ["libjemalloc.so.2", "libtcmalloc_minimal.so.4"])
def test_another_allocator_in_its_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", forbidden)
    (tmp_path / name).write_bytes(b"\0" * mmap.PAGESIZE)
    with (tmp_path / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert keep_freed_memory() is False


def test_on_a_cpu_and_for_a_fit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append(1))
    for accelerator in (CPUAccelerator(), CUDAAccelerator()):
        for stage in ("fit", "validate", "test", "predict"):
            trainer: Any = SimpleNamespace(accelerator=accelerator)
            KeepMemory().setup(trainer, None, stage)  # type: ignore[arg-type]
    assert len(calls) == 1


def test_the_option_of_the_trainer() -> None:
    def has(**options: Any) -> bool:
        trainer = Trainer(logger=False, accelerator="cpu", **options)
        return any(isinstance(callback, KeepMemory) for callback in trainer.callbacks)  # type: ignore[attr-defined]

    assert has()
    assert has(fast_dev_run=True)
    assert not has(keep_memory=False)
