"""scripts/benchmark_losses.py at a size that takes no time: its tables, and that all forms compute the same number."""

from __future__ import annotations

import json
from typing import Any

import benchmark_losses
import pytest
import torch

QUICK = ["--sizes", "64", "--width", "16", "--repeats", "3", "--seconds", "1"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("losses")
    files = ["--json", str(folder / "losses.json"), "--markdown", str(folder / "losses.md")]
    assert benchmark_losses.main([*QUICK, "--no_memory", *files]) == 0
    return json.loads((folder / "losses.json").read_text()), (folder / "losses.md").read_text()


def test_a_row_for_each_form(result: tuple[dict[str, Any], str]) -> None:
    rows, table = result[0]["rows"], result[1]
    assert {row["loss"] for row in rows} == set(benchmark_losses.LOSSES)
    for name, loss in benchmark_losses.LOSSES.items():
        of_loss = [row for row in rows if row["loss"] == name]
        assert set(loss.forms) <= {row["form"] for row in of_loss}
        assert of_loss[0]["form"] == next(iter(loss.forms))
        for row in of_loss:
            assert row["ratio"] == pytest.approx(row["ms"] / of_loss[0]["ms"])
            assert 0 < row["quartiles_ms"][0] <= row["ms"] <= row["quartiles_ms"][1]
            assert f"| {name} | 64 | 16 | {row['form']} | {row['ms']:.2f} |" in table
    assert torch.__version__.startswith(result[0]["machine"]["versions"]["torch"])


def test_all_forms_compute_the_same(result: tuple[dict[str, Any], str]) -> None:
    for name, loss in benchmark_losses.LOSSES.items():
        values = [row["value"] for row in result[0]["rows"] if row["loss"] == name and row["form"] in loss.forms]
        assert values == pytest.approx([values[0]] * len(values), abs=1e-5)
        assert abs(values[0]) > 1e-3
        leaves = benchmark_losses.inputs(name, 64, 16)
        first, *others = ([*torch.autograd.grad(form(*leaves), leaves)] for form in loss.forms.values())
        for other in others:
            for found, expected in zip(other, first, strict=True):
                assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_memory_in_a_process_of_its_own() -> None:
    """A matrix of 2,048 x 2,048 pairs has 16 MiB, of which autograd keeps several; the blocks have 1 MiB each."""
    floor = benchmark_losses.peak_memory("mk_mmd", "Gram, autograd", 1024, 16)
    ours = benchmark_losses.peak_memory("mk_mmd", "this project", 1024, 16)
    assert floor is not None
    assert ours is not None
    assert 1 < ours < 20
    assert floor > 5 * 16


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark_losses, "fits", lambda n: False)
    arguments = [*QUICK, "--losses", "mk_mmd", "--no_memory", "--no_peers"]
    assert benchmark_losses.main(arguments) == 0
    table = capsys.readouterr().out
    assert "| this project |" in table
    assert "| Gram, autograd |" not in table
    assert "Left out for want of memory: mk_mmd, n = 64: Gram, autograd." in table
