"""LWF, Co-Tuning and Bi-Tuning under two processes: equal ranks, exact resume, one process with the doubled batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import source_task_ddp_job as job
import torch
from contract import weights
from source_task import fit


@pytest.mark.slow
def test_two_processes(images: Callable[..., Path], tmp_path: Path) -> None:
    """With 37 images, of which 27 train: the processes' shares differ by one where the relationship is learned."""
    root = images(tmp_path / "data", ["a", "b", "c"], count=12)
    images(tmp_path / "data", ["a"], count=13)
    output = tmp_path / "result.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, job.__file__, str(root), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"ranks agree": True, "resumed differs in": []}
    assert json.loads(output.read_text()) == {method.__name__: expected for method in job.METHODS}
    for method in job.METHODS:
        two = torch.load(output.with_suffix(f".{method.__name__}.pt"), weights_only=True)
        data = job.data(method, batch_size=8)
        one = weights(fit(job.build(method), root, data=data, precision="64-true", max_epochs=2))
        L.seed_everything(0, verbose=False)
        start = weights(job.build(method)().double())
        names = [name for name in one if not name.startswith(("val_", "test_"))]
        assert max((one[name] - start[name]).abs().max() for name in names if "backbone" in name) > 1e-4  # it trained
        for name in names:
            torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-10, msg=f"{method.__name__}: {name}")
