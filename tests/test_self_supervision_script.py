"""experiments/self_supervision.py on tiny folders: what is pre-trained, what starts from it, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comparison_table
import pytest
import self_supervision as script
import torch
import yaml

SMALL: dict[str, Any] = {"batch_size": 4, "steps_per_epoch": 2, "image_size": 16, "crop": "none", "num_workers": 0}
MODEL: dict[str, Any] = {"backbone": "resnet8", "weights": None, "schedule": "constant", "schedule_options": {}}
TRAINER = {"max_epochs": 1, "accelerator": "cpu"}
START = "init_from={pretrained}"


def write(path: Path, kind: str, model: dict[str, Any] | None = None, **data: Any) -> Path:
    content = {
        "model": {"init_args": {**MODEL, **(model or {})}},
        "data": {"class_path": kind, "init_args": {**SMALL, **data}},
        "trainer": TRAINER,
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Callable[..., Path]) -> Path:
    """A working directory with folders and data files of two pairs, each with its file of unlabelled images."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("source", "target", "other", "test")):
        images(tmp_path / name, ["ant", "bee"], count=9, seed=number)
    for target in ("target", "other"):
        folders = {"source": "source", "target": target, "target_test": "test"}
        write(tmp_path / f"source_to_{target}.yaml", "DomainPairDataModule", {"bottleneck_features": 8}, **folders)
        both = ["source", target]
        write(tmp_path / f"source_and_{target}.yaml", "UnlabelledFolderDataModule", folders=both)
    write(tmp_path / "ants.yaml", "ImageFolderDataModule", root="source")
    return tmp_path


def run(command: str, data: list[str], unlabelled: list[str], *words: str) -> int:
    files = ["--data", *(f"{name}.yaml" for name in data), "--unlabelled", *(f"{name}.yaml" for name in unlabelled)]
    return script.main([command, *files, *words])


def rows(experiment: str) -> list[dict[str, Any]]:
    return comparison_table.read_csv(Path("lightning_logs") / experiment / "table.csv")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


STILL = "learning_rate=0.0,backbone_learning_rate_factor=0.0"


@pytest.mark.slow
def test_digits(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each pair and seed starts from its own pre-training; one table of both pairs."""
    methods = ["source_only", f"source_only:{STILL},{START}", "rotation", "dan_rotation"]
    pairs = ["source_to_target", "source_to_other"], ["source_and_target", "source_and_other"]
    words = ["--seeds", "2", "--methods", *methods]
    assert run("digits", *pairs, *words) == 0
    found = rows("self_supervision_digits")
    started = f"rotation_prediction, then source_only:{STILL}"
    names = ["source_only", started, "rotation", "dan_rotation"]
    assert [(row["pair"], row["seed"], row["method"], row["status"]) for row in found] == [
        (pair, seed, name, "finished") for pair in pairs[0] for seed in (0, 1) for name in names
    ]
    folder = Path("lightning_logs/self_supervision_digits")
    checkpoints = sorted(folder.glob("pretraining/rotation_prediction/*/seed_*.ckpt"))
    assert [path.parent.name.rsplit("_", 1)[0] for path in checkpoints] == ["source_and_other"] * 2 + [
        "source_and_target"
    ] * 2
    first = "backbone.conv1.weight"
    begun = {
        (path.parent.name.split("_")[2], int(path.stem[-1])): weights(path)[first].flatten().tolist()
        for path in checkpoints
    }
    assert len({tuple(values) for values in begun.values()}) == 4
    for row in found:
        if row["method"] == started:
            end = weights(folder / row["run"] / "checkpoints" / "last.ckpt")[first]
            assert end.flatten().tolist() == begun[row["pair"].split("_")[2], row["seed"]]
    table = (folder / "table.md").read_text()
    assert "gain over source_only" in table
    assert "gain over no_alignment" not in table  # it was not run
    assert table.count(f"| {started} |") == 2
    assert table in capsys.readouterr().out

    # again: nothing is run; another seed: that one alone
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.ckpt")}
    assert run("digits", *pairs, *words) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.ckpt")} == before
    assert rows("self_supervision_digits") == found
    assert run("digits", *pairs, *words[2:], "--seeds", "3") == 0
    assert len(list(folder.glob("pretraining/*/*/seed_*/version_*"))) == 6
    assert len(rows("self_supervision_digits")) == 24


def test_another_pretraining_is_another(here: Path) -> None:
    """Other images or another length: the checkpoint of before is not taken for it."""
    words = ["--seeds", "1", "--methods", f"source_only:{START}"]

    def checkpoints() -> int:
        return len(list(Path("lightning_logs").glob("self_supervision_digits/pretraining/*/*/seed_0.ckpt")))

    for expected, more in ((1, []), (2, ["--pretraining_epochs", "2"]), (2, [])):
        assert run("digits", ["source_to_target"], ["source_and_target"], *words, *more) == 0
        assert checkpoints() == expected
    (here / "target" / "ant" / "0.png").write_bytes((here / "target" / "bee" / "0.png").read_bytes())
    assert run("digits", ["source_to_target"], ["source_and_target"], *words) == 0
    assert checkpoints() == 3


def test_an_interrupted_pretraining_begins_anew(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--seeds", "1", "--methods", f"source_only:{START}"]
    with monkeypatch.context() as context:
        context.setattr(script.shutil, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("digits", ["source_to_target"], ["source_and_target"], *words)
    assert not list(Path("lightning_logs").rglob("seed_0.ckpt"))
    assert run("digits", ["source_to_target"], ["source_and_target"], *words) == 0
    assert len(list(Path("lightning_logs").rglob("seed_0.ckpt"))) == 1


def test_options_of_a_task(here: Path) -> None:
    """Of the model, or with a prefix of the data; each is a pre-training of its own, under a name of its own."""
    tasks = ["rotation_prediction", "rotation_prediction:rotations=random,data.mean=[0.4, 0.5, 0.6]"]
    words = ["--seeds", "1", "--methods", f"source_only:{START}", "--tasks", *tasks]
    assert run("digits", ["source_to_target"], ["source_and_target"], *words) == 0
    assert [row["method"] for row in rows("self_supervision_digits")] == [f"{task}, then source_only" for task in tasks]
    found = [
        torch.load(path, weights_only=True) for path in Path("lightning_logs").rglob("pretraining/*/*/seed_0.ckpt")
    ]
    described = {content["hyper_parameters"]["rotations"]: list(content["preprocessing"]["mean"]) for content in found}
    assert described.keys() == {"all", "random"}
    assert described["random"] == [0.4, 0.5, 0.6] != described["all"]


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_solar(here: Path) -> None:
    """Features of each task beside those of the data's weights, random ones and training from scratch."""
    tasks = ["rotation_prediction", "jigsaw_prediction:permutations=4"]  # a name for the table is enough
    words = ["--tasks", *tasks, "--seeds", "1", "--labels_per_class", "2"]
    write(here / "source_and_target.yaml", "UnlabelledFolderDataModule", folders="source", image_size=18)
    write(here / "ants.yaml", "ImageFolderDataModule", root="source", image_size=18)
    assert run("solar", ["ants"], ["source_and_target"], *words, "--epochs", "2") == 0
    found = rows("self_supervision_solar")
    assert [row["method"] for row in found] == [
        "from scratch",
        "random features",
        "ImageNet features",
        "rotation_prediction, then frozen",
        "jigsaw_prediction, then frozen",
    ]
    assert all(row["status"] == "finished" and row["steps"] == "4" and row["pair"] == "ants, labels 2" for row in found)
    table = (Path("lightning_logs/self_supervision_solar") / "table.md").read_text()
    assert "gain over from scratch ± 95 % | gain over random features" in table
    # a probe leaves the features as the task left them
    runs = {row["method"]: Path("lightning_logs/self_supervision_solar") / row["run"] for row in found}
    for task in ("rotation_prediction", "jigsaw_prediction"):
        (path,) = Path("lightning_logs/self_supervision_solar/pretraining", task).glob("*/seed_0.ckpt")
        learned, probed = weights(path), weights(runs[f"{task}, then frozen"] / "checkpoints" / "last.ckpt")
        assert all(torch.equal(value, probed[name]) for name, value in learned.items() if name.startswith("backbone."))


def test_a_failed_cell_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["source_only", "source_only:init_from=nowhere.ckpt"]
    words = ["--seeds", "1", "--methods", *methods]
    assert run("digits", ["source_to_target"], ["source_and_target"], *words) == 1
    assert "'nowhere.ckpt' does not exist" in capsys.readouterr().err
    assert "| failed |" in Path("lightning_logs/self_supervision_digits/table.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "`--seeds` and `--pretraining_epochs`"),
        (["--pretraining_epochs", "0"], "`--seeds` and `--pretraining_epochs`"),
        (["--unlabelled", "a.yaml", "b.yaml"], "as many files of `--unlabelled` as of `--data`, but got 2 and 1"),
        (["--unlabelled", "ants.yaml"], "UnlabelledFolderDataModule"),
        (["--tasks", "nothing"], "nothing.yaml"),
        (["--methods", f"source_only:{START}", "sourceonly"], "'sourceonly'. Did you mean 'source_only'"),
        (["--data", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes(here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--methods", f"source_only:{START}"]
    assert run("digits", ["source_to_target"], ["source_and_target"], *methods, *words) == 2
    assert message in capsys.readouterr().err
    assert not Path("lightning_logs").exists()


def test_the_files_that_it_names_exist() -> None:
    for default in script.DEFAULTS.values():
        for name in (*default["data"], *default["unlabelled"]):
            assert (script.HERE / "data" / f"{name}.yaml").is_file()
        for task in (task.partition(":")[0] for task in default["tasks"]):
            assert (script.HERE / "pretraining" / f"{task}.yaml").is_file()
        assert len(default["data"]) == len(default["unlabelled"])
        pair = default["labels_per_class"] is None
        for method in default["methods"]:
            folder = "methods" if pair else "transfer"
            assert (script.HERE / folder / f"{method.partition(':')[0]}.yaml").is_file()
