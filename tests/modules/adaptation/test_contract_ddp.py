"""The contract under two processes: exact resume, equal ranks, and the single process with the doubled batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import contract
import ddp_job
import lightning
import pytest
import torch

METHODS = [method.__name__ for method in contract.methods()]

pytestmark = pytest.mark.xdist_group("ddp")  # in one process, which runs the job once


@pytest.fixture(scope="module")
def job(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, bool]]]:
    """One job for all methods: starting two processes takes longer than training in them."""
    output = tmp_path_factory.mktemp("ddp") / "result.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ddp_job.__file__, str(domains), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output, json.loads(output.read_text())


@pytest.mark.parametrize("name", METHODS)
def test_ranks_agree_and_resume_is_exact(name: str, job: tuple[Path, dict[str, dict[str, bool]]]) -> None:
    assert job[1][name] == {"ranks agree": True, "resumed equals whole": True}


@pytest.mark.parametrize("method", contract.methods(), ids=METHODS)
def test_two_processes_equal_one_with_the_doubled_batch(
    method: Any, domains: Path, job: tuple[Path, dict[str, dict[str, bool]]]
) -> None:
    two = torch.load(job[0].with_suffix(f".{method.__name__}.pt"), weights_only=True)
    one = contract.weights(
        contract.fit(
            method,
            domains,
            data={"batch_size": 8, "image_size": 32},
            model=ddp_job.DOUBLE,
            precision="64-true",
            max_epochs=2,
        )
    )
    lightning.seed_everything(0, verbose=False)
    start = contract.weights(contract.build_model(method, **ddp_job.DOUBLE).double())
    floats = [name for name, value in one.items() if value.is_floating_point() and "running" not in name]
    assert any((one[name] - start[name]).abs().max() > 1e-4 for name in floats)  # it trained
    for name in floats:
        torch.testing.assert_close(
            two[name], one[name], rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
