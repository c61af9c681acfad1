"""The comparison: what makes a cell, that finished ones are kept, that a failed one stops nothing, and the table."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import compare_methods
import comparison_table
import numpy as np
import pytest
import scipy.stats
import torch
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def compare() -> ModuleType:
    return compare_methods


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Callable[..., Path]) -> Path:
    """A working directory with a pair of small domains and its file."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("source", "target", "test")):
        images(tmp_path / "digits" / name, ["ant", "bee"], count=7, seed=number)
    return write(tmp_path / "ants_to_bees.yaml")


def write(path: Path, folder: str = "digits", model: dict[str, Any] | None = None, **data: Any) -> Path:
    folders = {"source": f"{folder}/source", "target": f"{folder}/target", "target_test": f"{folder}/test"}
    small = {"batch_size": 4, "steps_per_epoch": 3, "image_size": 16, "crop": "none", "num_workers": 0, **data}
    content = {
        "model": {"init_args": {"backbone": "resnet8", "weights": None, "bottleneck_features": 8, **(model or {})}},
        "data": {"class_path": "DomainPairDataModule", "init_args": {**folders, **small}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def rows(experiment: str = "comparison") -> list[dict[str, str]]:
    with (Path("lightning_logs") / experiment / "table.csv").open() as file:
        return list(csv.DictReader(file))


def runs() -> int:
    return len(list(Path("lightning_logs").glob("comparison/*/*/version_*")))


def arguments(pair: Path, *more: str) -> list[str]:
    return ["--data", str(pair), "--methods", "source_only", "dan", "--seeds", "2", *more]


def test_finished_cells_are_recognised_by_content(
    compare: ModuleType, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(arguments(pair)) == 0
    first = rows()
    assert [(row["method"], row["seed"]) for row in first] == [
        ("source_only", "0"),
        ("dan", "0"),
        ("source_only", "1"),
        ("dan", "1"),
    ]
    assert all(row["status"] == "finished" and row["steps"] == "3" for row in first)
    assert all((Path("lightning_logs/comparison") / row["run"] / "checkpoints" / "last.ckpt").exists() for row in first)
    assert runs() == 4
    # elsewhere, and read by other workers: the same cells
    shutil.move("digits", "moved")
    write(pair, "moved", num_workers=1)
    assert compare.main(arguments(pair)) == 0
    assert rows() == first
    assert runs() == 4
    # another seed costs one run a method, another method its own
    assert compare.main([*arguments(pair), "--seeds", "3"]) == 0
    assert runs() == 6
    # another option or another file: other cells
    write(pair, "moved", model={"learning_rate": 0.5})
    assert compare.main(arguments(pair)) == 0
    assert runs() == 10
    shutil.copy("moved/source/ant/0.png", "moved/source/ant/1.png")
    assert compare.main(arguments(pair)) == 0
    assert runs() == 14
    assert "4 cells: 0 are finished, 4 to run." in capsys.readouterr().out
    assert not list(Path("lightning_logs").rglob("*.partial"))


def test_a_failed_cell_stops_nothing_and_is_tried_again(
    compare: ModuleType, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(pair, target_batch_size=3)  # dan.yaml's estimator refuses that
    assert compare.main(arguments(pair)) == 1
    printed = capsys.readouterr()
    assert "2 of 4 cells failed" in printed.err
    assert "--data.target_batch_size" in printed.err
    assert [row["status"].split(":")[0] for row in rows()] == ["finished", "failed", "finished", "failed"]
    table = Path("lightning_logs/comparison/table.md").read_text()
    assert "| bees | dan | failed |" in table
    write(pair, target_batch_size=4)
    assert compare.main(arguments(pair)) == 0
    assert len(list(Path("lightning_logs/comparison/cells").glob("*.json"))) == 6


def test_an_error_of_any_kind_is_reported(
    compare: ModuleType, pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = compare.run

    def run(cell: Any, *rest: Any) -> Any:
        if cell.method == "source_only":
            raise FloatingPointError("not a number")
        return right(cell, *rest)

    monkeypatch.setattr(compare, "run", run)
    assert compare.main(arguments(pair)) == 1
    assert "FloatingPointError: not a number" in capsys.readouterr().err
    assert [row["status"][:8] for row in rows()] == ["failed: ", "finished", "failed: ", "finished"]


def test_the_row_is_what_lightning_measured(compare: ModuleType, pair: Path) -> None:
    assert compare.main(arguments(pair)) == 0
    for row in rows():
        written = (Path("lightning_logs/comparison") / row["run"] / "metrics.csv").read_text()
        (accuracy,) = [line.rsplit(",", 1)[1] for line in written.splitlines() if "test/accuracy" in line]
        assert float(row["accuracy"]) == pytest.approx(float(accuracy), abs=1e-6)
        assert 0 < float(row["seconds_per_step"]) < 10


def cell(method: str, seed: int, accuracy: float, seconds: float = 1.0) -> dict[str, Any]:
    scores = {"accuracy": accuracy, "mean_class_accuracy": accuracy / 2, "macro_f1": accuracy / 4}
    return {
        "pair": "a_to_b",
        "method": method,
        "seed": seed,
        "status": "finished",
        "seconds_per_step": seconds,
        **scores,
    }


def test_table_against_independent_statistics() -> None:
    source_only, dann = [0.5, 0.6, 0.55], [0.8, 0.7, 0.9]
    cells = [cell("source_only", seed, value) for seed, value in enumerate(source_only)]
    cells += [cell("dann", seed, value, seconds=2.0 + seed) for seed, value in enumerate(dann)]
    lines = comparison_table.write_markdown(cells, ["source_only", "dann"], ["a_to_b"], ["source_only"]).splitlines()
    found = [[word.strip() for word in line.strip("|").split("|")] for line in lines[2:]]
    interval = scipy.stats.ttest_rel(dann, source_only).confidence_interval(0.95)
    half = 100 * (interval.high - interval.low) / 2
    gain = 100 * np.mean(np.subtract(dann, source_only))
    mean, deviation = 100 * np.mean(dann), 100 * np.std(dann, ddof=1)
    assert found[0] == [
        "b",
        "dann",
        f"{mean:.1f} ± {deviation:.1f}",
        f"{mean / 2:.1f} ± {deviation / 2:.1f}",
        f"{mean / 4:.1f} ± {deviation / 4:.1f}",
        f"{gain:+.1f} ± {half:.1f}",
        "3.00",
        "3",
    ]
    assert found[1][:2] == ["b", "source_only"]
    assert found[1][5:] == ["", "1.00", "3"]


def test_other_baselines_and_scores() -> None:
    cells = [cell("source_only", 0, 0.5), cell("dan", 0, 0.6, seconds=2.0), cell("dann", 0, 0.9, seconds=3.0)]
    names = ["source_only", "dan", "dann"]
    lines = comparison_table.write_markdown(cells, names, ["a_to_b"], ["dan", "source_only"], "macro_f1").splitlines()
    assert "gain over dan " in lines[0]
    assert lines[2] == "| b | dann | 90.0 | 45.0 | 22.5 | +7.5 | +10.0 | 1.50 | 1 |"
    assert lines[3] == "| b | dan | 60.0 | 30.0 | 15.0 |  | +2.5 | 1.00 | 1 |"
    assert len({line.count("|") for line in lines}) == 1


def test_tables_of_finished_comparisons(compare: ModuleType, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(arguments(pair)) == 0
    table = Path("lightning_logs/comparison/table.md").read_text()
    capsys.readouterr()
    assert comparison_table.main(["lightning_logs/comparison/table.csv", "--baselines", "source_only"]) == 0
    assert capsys.readouterr().out == table
    assert comparison_table.main(["lightning_logs/comparison/table.csv", "--baselines", "dann"]) == 2
    assert "Did you mean 'dan'" in capsys.readouterr().err
    assert comparison_table.main([str(pair), "--baselines", "dan"]) == 2
    assert "table.csv" in capsys.readouterr().err


def test_committed_rows_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    path = REPOSITORY / "experiments" / "comparison.csv"
    assert comparison_table.main([str(path), "--baselines", "source_only", "no_alignment"]) == 0
    lines = capsys.readouterr().out.splitlines()
    committed = (REPOSITORY / "experiments" / "README.md").read_text()
    for line in lines[2:]:  # the tables there have a title for the data and leave columns out
        _, method, accuracy, class_mean, *_ = (word.strip() for word in line.strip("|").split("|"))
        assert f"| {method} | {accuracy} | {class_mean} |" in committed


def test_the_gain_is_paired_by_seed() -> None:
    gain, half = comparison_table.paired_gain({0: 0.9, 1: 0.8, 5: 0.1}, {1: 0.7, 0: 0.8, 2: 0.0})
    assert (gain, half) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    gain, half = comparison_table.paired_gain({0: 0.9}, {0: 0.8})
    assert gain == pytest.approx(0.1)
    assert math.isnan(half)
    assert comparison_table.paired_gain({0: 0.9}, {1: 0.8}) is None


def test_options_of_a_method_make_another_cell(compare: ModuleType, pair: Path) -> None:
    names = ["source_only", "dan:trade_off=0.5,bottleneck_features=4"]
    assert compare.main(["--data", str(pair), "--methods", *names, "--seeds", "1"]) == 0
    second = rows()[1]
    assert second["method"] == names[1]
    changed = yaml.safe_load((Path("lightning_logs/comparison") / second["run"] / "hparams.yaml").read_text())
    assert (changed["trade_off"], changed["bottleneck_features"]) == (0.5, 4)
    assert compare.compose("dan", pair, 0, {}).model["trade_off"] != 0.5
    nested = "cdan_mcc:terms={dan: 1, mcc: 0.5},term_options={dan: {kernel_scales: [1, 2]}, mcc: {}},trade_off=2"
    model = compare.compose(nested, pair, 0, {}).model
    assert (model["terms"], model["trade_off"]) == ({"dan": 1, "mcc": 0.5}, 2)
    assert model["term_options"] == {"dan": {"kernel_scales": [1, 2]}, "mcc": {}}


def test_the_seed_in_an_option(
    compare: ModuleType, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each seed's cell starts from that seed's file; the table has one method, under the name that was given."""
    first = ["--data", str(pair), "--methods", "source_only", "--seeds", "2", "--experiment", "first"]
    assert compare.main(first) == 0
    for row in rows("first"):
        (tmp_path / f"seed_{row['seed']}").mkdir()
        checkpoint = Path("lightning_logs/first") / row["run"] / "checkpoints" / "last.ckpt"
        shutil.copy(checkpoint, tmp_path / f"seed_{row['seed']}" / "a.ckpt")
    name = "source_only:init_from=seed_{seed}/a.ckpt,learning_rate=0.0,backbone_learning_rate_factor=0.0"
    words = ["--data", str(pair), "--methods", name, "--baseline", name, "--seeds"]
    assert compare.main([*words, "2"]) == 0
    assert [(row["method"], row["seed"], row["status"]) for row in rows()] == [
        (name, "0", "finished"),
        (name, "1", "finished"),
    ]
    for row in rows():
        begun = torch.load(f"seed_{row['seed']}/a.ckpt", weights_only=True)["state_dict"]
        ended = torch.load(
            Path("lightning_logs/comparison") / row["run"] / "checkpoints" / "last.ckpt", weights_only=True
        )["state_dict"]
        assert torch.equal(ended["backbone.conv1.weight"], begun["backbone.conv1.weight"])
    assert name in Path("lightning_logs/comparison/table.md").read_text()
    # by content: what another seed starts from changes that seed's cell alone
    shutil.copy("seed_0/a.ckpt", "seed_1/a.ckpt")
    capsys.readouterr()
    assert compare.main([*words, "2"]) == 0
    assert "2 cells: 1 are finished, 1 to run." in capsys.readouterr().out
    # a file that is not there is that cell's failure
    assert compare.main([*words, "3"]) == 1
    assert "'seed_2/a.ckpt' does not exist" in rows()[2]["status"]


def test_one_folder_with_few_labels(
    compare: ModuleType, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = yaml.safe_load(pair.read_text())
    small = {key: folder["data"]["init_args"][key] for key in ("batch_size", "steps_per_epoch", "image_size", "crop")}
    folder["data"] = {
        "class_path": "ImageFolderDataModule",
        "init_args": {"root": "digits/source", "num_workers": 0, **small},
    }
    path = tmp_path / "ants.yaml"
    path.write_text(yaml.safe_dump(folder))
    words = ["--data", str(path), "--methods", "full", "frozen", "--seeds", "1", "--labels_per_class", "2", "1.0"]
    assert compare.main([*words, "--score", "macro_f1"]) == 0
    found = [(row["pair"], row["method"], row["status"]) for row in rows()]
    assert found == [
        (f"ants, labels {labels}", method, "finished") for labels in ("2", "1.0") for method in ("full", "frozen")
    ]
    assert all((Path("lightning_logs/comparison") / row["run"]).is_dir() for row in rows())
    assert compare.main([*words, "--data", str(path), str(pair)]) == 2
    assert "single folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "sourceonly"], "'sourceonly'. Did you mean 'source_only'"),
        (["--methods", "source_only", "dan:trade_off"], "'trade_off'"),
        (["--seeds", "0"], "`--seeds`"),
        (["--baseline", "dann"], "`--baseline` to be among `--methods`"),
        (["--data", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes(
    compare: ModuleType, pair: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(arguments(pair, *words)) == 2
    assert message in capsys.readouterr().err
    assert not Path("lightning_logs").exists()


def test_all_methods_with_the_baseline_first(compare: ModuleType) -> None:
    names = compare.chosen_methods(["all"])
    assert names[0] == "source_only"
    assert set(names) == {path.stem for path in (REPOSITORY / "experiments" / "methods").glob("*.yaml")}
    assert compare.chosen_methods(["all", "sdat:radius=0.1", "dann"]) == [*names, "sdat:radius=0.1"]


def test_warnings_of_a_run_are_kept(compare: ModuleType, pair: Path) -> None:
    write(pair, model={"learning_rate": 0.0, "backbone_learning_rate_factor": 0.0}, steps_per_epoch=50)
    assert compare.main([*arguments(pair), "--methods", "source_only", "--seeds", "1"]) == 0
    (kept,) = [json.loads(path.read_text()) for path in Path("lightning_logs").rglob("cells/*.json")]
    assert "`train/classification_loss` is" in kept["warnings"]
