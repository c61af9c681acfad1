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


@pytest.fixture(scope="module")
def job(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, bool]]]:
    """One job for all methods: starting two processes takes longer than training in them."""
    output = tmp_path_factory.mktemp("ddp") / "result.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ddp_job.__file__, str(domains), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output, json.loads(output.read_text())


@pytest.mark.slow
def test_every_method(job: tuple[Path, dict[str, dict[str, bool]]], domains: Path) -> None:
    """A single test, since pytest's processes would each run a job of their own."""
    output, result = job
    methods = contract.methods()
    assert result == {method.__name__: {"ranks agree": True, "resumed equals whole": True} for method in methods}
    differences = [text for method in methods for text in differing(method, domains, output)]
    assert not differences, "\n".join(differences)


def differing(method: Any, domains: Path, output: Path) -> list[str]:
    """Where two processes with four images each differ from one with eight, in float64."""
    two = torch.load(output.with_suffix(f".{method.__name__}.pt"), weights_only=True)
    data = {"batch_size": 8, "image_size": 32}
    one = contract.weights(
        contract.fit(method, domains, data=data, model=ddp_job.DOUBLE, precision="64-true", max_epochs=2)
    )
    lightning.seed_everything(0, verbose=False)
    start = contract.weights(contract.build_model(method, **ddp_job.DOUBLE).double())
    floats = [name for name, value in one.items() if value.is_floating_point() and "running" not in name]
    assert any((one[name] - start[name]).abs().max() > 1e-4 for name in floats)  # it trained
    return [
        f"{method.__name__}, {name}: {(two[name] - one[name]).abs().max():.1e}"
        for name in floats
        if not torch.allclose(two[name], one[name], rtol=1e-9, atol=1e-10)
    ]
