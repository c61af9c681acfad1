"""What a training step does on an accelerator, on a machine without one: it stays there, and waits for nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import contract
import pretraining_contract
import pytest
import torch.utils.backend_registration
import transfer_contract

JOB = Path(__file__).with_name("shapes_only_job.py")


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends written in Python",
)
def test_every_method(domains: Path, tmp_path: Path, images: Callable[..., Path]) -> None:
    """No operation on two devices, no copy from or to the host in a step, and one reading of values for each row."""
    output = tmp_path / "result.json"
    folders = [
        str(domains),
        str(transfer_contract.prepare(tmp_path / "transfer", images)),
        str(pretraining_contract.prepare(tmp_path / "pretraining", images)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(JOB), *folders, str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    names = {method.__name__ for method in contract.methods()}
    names |= {f"transfer {case.name}" for case in transfer_contract.cases()}
    names |= {f"pre-training {method.__name__}" for method in pretraining_contract.methods()}
    assert names < result.keys()
    wrong = [f"{name}: {problem}" for name, problem in result.items() if problem]
    assert not wrong, "\n".join(wrong)
