"""scripts/benchmark_run.py at a size that takes little time: every run, and where its time goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import benchmark_run
import pytest

pytestmark = pytest.mark.slow


def test_runs(images: Callable[..., Path], tmp_path: Path) -> None:
    for domain in ("source", "target"):
        images(tmp_path / domain, ["a", "b"], count=8)
    folders = ["--folders", str(tmp_path / "source"), str(tmp_path / "target")]
    size = ["--backbone", "resnet8", "--image_size", "16", "--batch_size", "4", "--turns", "1"]
    out = tmp_path / "run.json"
    assert benchmark_run.main(["--parts", "run", *size, *folders, "--json", str(out)]) == 0
    rows = {row["run"]: row for row in json.loads(out.read_text())["run"]}
    assert list(rows) == [*benchmark_run.NO_DATA, *benchmark_run.PUBLISHED, *benchmark_run.RUNS]
    for name, row in rows.items():
        assert row["ms"] > 0
        assert (row["profile"] is not None) == (name in benchmark_run.RUNS)
        if row["profile"]:
            assert 0.1 < row["step"] < 1
            assert row["step"] + row["profile"]["[_TrainingEpochLoop].train_dataloader_next"] < 1


def test_folders_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark_run.main(["--parts", "run", "--folders", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "scripts/prepare_solar_cells.py" in capsys.readouterr().err
