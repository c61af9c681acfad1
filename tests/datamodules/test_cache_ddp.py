"""Two processes share one file of each folder, which one of them has decoded, and train as without a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cache_ddp_job as job
import pytest


@pytest.mark.slow
def test_two_processes_share_a_cache(domains: Path, tmp_path: Path) -> None:
    output, folder = tmp_path / "result.json", tmp_path / "caches"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, job.__file__, str(domains), str(folder), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["same batches"] == [[True, True], [True, True]]
    assert result["batches"] > 10
    for storage in ("none", "memory", "disk"):
        assert result[storage]["ranks differ"]
    images = 39 + 31
    for storage in ("memory", "disk"):
        assert sum(result[storage]["decoded"]) == images  # each once, by either process
        files = result[storage]["files"]
        assert files[0] == files[1]
        here = [file for file in files[0] if Path(file).parent == folder / storage]
        assert len(here) == 2  # one a folder
        assert all(Path(file).parent.name == storage for file in here)
    end = time.monotonic() + 60  # the second process may end after the first, which alone was waited for
    while list((folder / "memory").iterdir()) and time.monotonic() < end:
        time.sleep(0.1)
    assert list((folder / "memory").iterdir()) == []  # nothing is left behind
    assert len(list((folder / "disk").glob("*.pixels"))) == 2
