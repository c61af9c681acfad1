"""What the benchmarks share: which machine it is, medians with their spread, peak memory of a process of its own."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(*packages: str) -> dict[str, Any]:
    """What figures belong to: the device, and the versions of Python and of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    where = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores' threads"
    if DEVICE.type == "cuda":
        where = torch.cuda.get_device_name()
    return {"device": f"{where} ({platform.processor() or platform.machine()})", "versions": versions}


def in_words(found: dict[str, Any]) -> str:
    """What :func:`machine` found, in a line."""
    return f"{found['device']}; {', '.join(f'{name} {version}' for name, version in found['versions'].items())}"


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, mean and quartiles of times."""
    ordered = sorted(seconds)
    return {
        "ms": 1e3 * statistics.median(ordered),
        "mean_ms": 1e3 * statistics.fmean(ordered),
        "quartiles_ms": [1e3 * ordered[len(ordered) // 4], 1e3 * ordered[-1 - len(ordered) // 4]],
        "repeats": len(ordered),
    }


def in_own_process(script: str, arguments: Sequence[str], environment: dict[str, str] | None = None) -> str | None:
    """The last line that a script prints in a process of its own; None where that failed, as without memory."""
    path = os.pathsep.join([entry for entry in sys.path if entry])
    command = [sys.executable, script, *arguments]
    variables = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode != 0:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return done.stdout.strip().splitlines()[-1]


def high_water(reset: bool = False) -> float:
    """Most MiB that the process has held, on a GPU of the GPU's memory. On Linux and there it can be reset: importing
    has held more than is left."""
    if DEVICE.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**10


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def spread(row: dict[str, Any]) -> str:
    """The quartiles that :func:`milliseconds` found."""
    low, high = row["quartiles_ms"]
    return f"{low:.1f}-{high:.1f}"


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"
