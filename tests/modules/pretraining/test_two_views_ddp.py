"""SimCLR and VICReg: two processes with four images each learn what one with eight does, and validate on their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import two_views_ddp_job as job
from torch import Tensor


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    output = tmp_path / "result.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, job.__file__, str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(output, weights_only=True)
    for method in job.METHODS:
        check(method, result[method.__name__])


def check(method: Any, two: dict[str, Any]) -> None:
    one, losses = job.train(method, 0, 1, precision="64-true")
    torch.testing.assert_close(two["losses"], losses, rtol=1e-9, atol=1e-10)
    assert losses.unique().numel() == 4
    start = job.build(method).double().state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-9, atol=1e-10, msg=f"{method.__name__}: {name}")
        assert value.ndim < 2 or (value - start[name]).abs().max() > 1e-5, name  # it trained

    # two batches of two on the first process, the fifth image left out, and one on the second: each a third
    parts = [validation(one, job.views()[0, part]) for part in (slice(0, 2), slice(2, 4), slice(5, 7))]
    assert float(two["val/loss"]) == pytest.approx(sum(parts) / 3, rel=1e-6)
    assert torch.isfinite(two["bf16 val/loss"])


@torch.no_grad()
def validation(module: Any, images: Tensor) -> float:
    return float(module.eval().task(module.backbone, images))
