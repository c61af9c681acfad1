"""scripts/benchmark_step.py at a size that takes no time: its tables, and that a hand-written loop of another loss ends
it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import benchmark_step
import hand_written
import pytest
import torch
from benchmark_step import BARE, HAND, PEER, TRAINER, TWO
from peers import pytorch_adapt

SMALL = ["--backbone", "resnet8", "--image_size", "8", "--batch_size", "4", "--steps", "4", "--warm_up", "1"]
QUICK = [*SMALL, "--no_peers"]


def test_steps_and_overhead(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "step.json"), "--markdown", str(tmp_path / "step.md")]
    more = ["--methods", "dann", "dan", "cdan", "mcc", "bnm", "--overhead_steps", "20", "--no_memory"]
    assert benchmark_step.main([*QUICK, *more, *files]) == 0
    result, text = json.loads((tmp_path / "step.json").read_text()), (tmp_path / "step.md").read_text()
    forms: dict[str, dict[str, Any]] = {}
    for row in result["steps"]:
        forms.setdefault(row["method"], {})[row["form"]] = row
        assert f"| {row['method']} | {row['form']} | {row['ms']:.1f} |" in text
    assert set(forms["dann"]) == {TRAINER, BARE, HAND, TWO}
    assert set(forms["cdan"]) == set(forms["mcc"]) == set(forms["dan"]) == {TRAINER, BARE, HAND}
    assert set(forms["bnm"]) == {TRAINER, BARE}  # nobody has written its loop
    for rows in forms.values():
        assert rows[BARE]["of_bare"] == 1
        assert rows[TRAINER]["of_bare"] == pytest.approx(rows[TRAINER]["ms"] / rows[BARE]["ms"])
        assert rows[TRAINER]["repeats"] == 4
    assert {row["module"] for row in result["overhead"]} == {"ImageClassifier", "SourceOnly", "DANN"}


def test_turns_of_several_steps_in_bfloat16(tmp_path: Path) -> None:
    """Ten steps are five turns: the first warms up, and none is begun that would not end."""
    more = ["--parts", "steps", "--methods", "dann", "dan", "--precision", "bf16-mixed", "--block", "2", "--no_memory"]
    out = tmp_path / "step.json"
    assert benchmark_step.main([*QUICK, *more, "--steps", "10", "--json", str(out)]) == 0
    for row in json.loads(out.read_text())["steps"]:
        assert row["repeats"] == 4
        assert row["images_per_second"] == pytest.approx(8e3 / row["ms"])


@pytest.mark.parametrize("block", ["1", "2"])
@pytest.mark.parametrize("method", ["dann", "dan", "cdan", "mcc"])
def test_a_loop_of_another_loss_is_refused(method: str, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hand_written.ALIGNMENTS, method, lambda *inputs: 1.1 * hand_written.source_only(*inputs) + 0.01)
    with pytest.raises(AssertionError, match="not close"):
        benchmark_step.main([*QUICK, "--parts", "steps", "--methods", method, "--no_memory", "--block", block])


@pytest.mark.parametrize("method", ["dann", "dan", "mcc"])
def test_pytorch_adapt_trains_the_networks_of_the_module(method: str, tmp_path: Path) -> None:
    """On one batch of noise its loss falls; and it is a row of the table."""
    pytest.importorskip("pytorch_adapt.hooks")
    options = benchmark_step.all_options().parse_args(SMALL)
    step = pytorch_adapt(method, benchmark_step.build(method, options))
    assert step is not None
    batch = benchmark_step.random_batch(16, 8, 31)
    losses = [step(batch).item() for _ in range(20)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    out = tmp_path / "step.json"
    more = ["--parts", "steps", "--methods", method, "--no_memory", "--json", str(out)]
    assert benchmark_step.main([*SMALL, *more]) == 0
    assert PEER in {row["form"] for row in json.loads(out.read_text())["steps"]}


def test_where_pytorch_adapt_does_not_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_adapt.hooks", None)
    assert pytorch_adapt("dann", torch.nn.Identity()) is None
    assert "no column for pytorch-adapt: " in capsys.readouterr().err
    assert pytorch_adapt("cdan", torch.nn.Identity()) is None  # a method of which it has no like


@pytest.mark.slow
def test_memory_in_a_process_of_its_own() -> None:
    """ResNet-18 has 11 million parameters: with gradients and momentum 128 MiB."""
    options = benchmark_step.all_options().parse_args(["--image_size", "16", "--batch_size", "2"])
    for form in (HAND, TRAINER):
        assert 128 < (benchmark_step.peak_memory("dann", form, options) or 0) < 400
