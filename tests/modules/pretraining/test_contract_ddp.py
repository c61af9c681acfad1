"""The contract under two processes: equal ranks, exact resume, one number of a validation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pretraining_contract as contract
import pretraining_ddp_job as job
import pytest


@pytest.mark.slow
def test_every_method(tmp_path: Path, images: Callable[..., Path]) -> None:
    """One job for all, in a single test: starting two processes takes longer than training in them."""
    folder, output = contract.prepare(tmp_path, images), tmp_path / "result.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, job.__file__, str(folder), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result.keys() == {method.__name__ for method in contract.methods()}
    wrong = [f"{name}, {what}" for name, found in result.items() for what, holds in found.items() if not holds]
    assert not wrong
