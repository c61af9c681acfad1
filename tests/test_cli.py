"""The command line as a user types it."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml

from framework.__main__ import main
from framework.loggers import TensorBoardRun
from framework.modules import DANN
from framework.networks import create_backbone

DATA = (
    "--data DomainPairDataModule --data.source {d}/source --data.target {d}/target --data.target_test {d}/target_test "
    "--data.image_size 16 --data.crop none --data.num_workers 0 --data.batch_size 4 "
)
MODEL = "--model DANN --model.backbone resnet8 --model.bottleneck_features 8 --model.discriminator_features 8 "
TRAINER = (
    "--trainer.max_epochs 2 --trainer.accelerator cpu --trainer.limit_train_batches 3 --trainer.log_every_n_steps 1 "
    "--trainer.enable_progress_bar false "
)
RUN = "lightning_logs/default/version_0"
PLAIN = (str, int, float, bool, type(None))


@pytest.fixture
def command(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Runs a command line in an empty working directory; ``{d}`` stands for the domains."""
    monkeypatch.chdir(tmp_path)
    return lambda line: main(shlex.split(line.format(d=domains)))


@pytest.fixture
def resolved(command: Callable[[str], int], capsys: pytest.CaptureFixture[str]) -> Callable[[str], dict[str, Any]]:
    """The configuration that a command line would run."""

    def configuration(line: str) -> dict[str, Any]:
        capsys.readouterr()
        assert command(line + " --print_config") == 0
        return yaml.safe_load(capsys.readouterr().out)  # type: ignore[no-any-return]

    return configuration


@pytest.fixture(scope="module")
def trained(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``fit`` has run two epochs of DANN; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(shlex.split(("fit " + MODEL + DATA + TRAINER).format(d=domains))) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(trained: Path, command: Callable[[str], int], tmp_path: Path) -> Path:
    """A copy of that run in the working directory."""
    shutil.copytree(trained / "lightning_logs", tmp_path / "lightning_logs")
    return tmp_path / RUN


def names(folder: Path) -> set[str]:
    """What lies in a run's folder, but TensorBoard's files."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if "tfevents" not in name}


def rows(folder: Path) -> list[list[str]]:
    """The rows of the run's metrics."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.reader(file))


def in_a_new_process(code: str, *arguments: str, **options: Any) -> str:
    """What a Python program prints."""
    line = [sys.executable, *options.pop("flags", []), "-c", code, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------- what a run leaves
def test_fit_leaves_configuration_logs_and_checkpoints(trained: Path, domains: Path) -> None:
    assert names(trained / RUN) >= {
        "config.yaml",
        "hparams.yaml",
        "metrics.csv",
        "split.csv",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    }
    assert list((trained / RUN).glob("events.out.tfevents.*"))
    configuration = yaml.safe_load((trained / RUN / "config.yaml").read_text())
    assert configuration["seed_everything"] == 0
    assert configuration["model"]["init_args"]["backbone"] == "resnet8"
    assert configuration["model"]["init_args"]["trade_off"] == 1.0  # defaults too
    assert configuration["data"]["init_args"]["source"] == f"{domains}/source"
    logged = {name for _, name, _ in rows(trained / RUN)[1:]}
    assert {"train/loss", "train/alignment_loss", "val/source_accuracy"} <= logged


def test_checkpoints_are_plain_and_rebuild_their_module(trained: Path, tmp_path: Path) -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            check(list(value) + list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert type(value) in PLAIN, value

    path = trained / RUN / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    check(checkpoint["hyper_parameters"])
    check(checkpoint["datamodule_hyper_parameters"])
    assert checkpoint["hyper_parameters"]["num_classes"] == 3  # linked from the data

    images = torch.randn(5, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys, torch
import lightning.pytorch as L
import framework.modules
path, folder = sys.argv[1:]
images = torch.load(folder + "/images.pt")
first = L.LightningModule.load_from_checkpoint(path, weights_only=True)
second = framework.modules.DANN.load_from_checkpoint(path)
assert type(first) is type(second) is framework.modules.DANN
with torch.inference_mode():
    torch.save([first.eval()(images), second.eval()(images)], folder + "/logits.pt")
"""
    in_a_new_process(code, str(path), str(tmp_path))
    with torch.no_grad():
        here = DANN.load_from_checkpoint(path).eval()(images)
    for there in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(there, here, rtol=0, atol=0)


def test_a_checkpoint_does_not_need_the_weights_it_started_from(
    command: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(create_backbone("resnet8").state_dict(), tmp_path / "start.pth")
    assert command("fit " + MODEL + DATA + TRAINER + "--model.weights start.pth") == 0
    (tmp_path / "start.pth").unlink()
    assert command(f"test --run {RUN}") == 0
    assert type(L.LightningModule.load_from_checkpoint(f"{RUN}/checkpoints/last.ckpt")) is DANN


def test_a_new_run_never_touches_another(run: Path, command: Callable[[str], int], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command("fit " + MODEL + DATA + TRAINER) == 0
    assert command("fit " + MODEL + DATA + TRAINER + "--trainer.experiment digits/dann") == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert (run.parent / "version_1" / "config.yaml").is_file()
    assert (tmp_path / "lightning_logs" / "digits" / "dann" / "version_0" / "config.yaml").is_file()


@pytest.mark.slow
def test_runs_that_start_at_the_same_time_have_folders_of_their_own(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from framework.loggers import TensorBoardRun
root, me, others = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(root / ("ready" + me)).touch()
while len(list(root.glob("ready*"))) < others:
    time.sleep(0.001)
print(*(TensorBoardRun(root / "logs", "same").version for _ in range(25)))
"""
    (tmp_path / "logs").mkdir()
    with ThreadPoolExecutor(2) as pool:
        printed = list(pool.map(lambda me: in_a_new_process(code, str(tmp_path), me, "2"), ["a", "b"]))
    taken = [int(number) for line in printed for number in line.split()]
    assert sorted(taken) == list(range(50))

    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: TensorBoardRun(tmp_path / "logs", "threads").version, range(40)))
    assert sorted(versions) == list(range(40))  # type: ignore[type-var]


def test_fast_dev_run_leaves_nothing(command: Callable[[str], int], tmp_path: Path) -> None:
    assert command("fit " + MODEL + DATA + TRAINER + "--trainer.fast_dev_run true") == 0
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- configuration
def write(folder: Path, **files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def test_later_configurations_and_flags_win(
    resolved: Callable[[str], dict[str, Any]], domains: Path, tmp_path: Path
) -> None:
    write(
        tmp_path,
        data={
            "data": {
                "class_path": "DomainPairDataModule",  # a bare name
                "init_args": {"source": str(domains / "source"), "target": str(domains / "target")},
            }
        },
        method={"model": {"class_path": "DANN", "init_args": {"trade_off": 0.5, "reversal_gamma": 5.0}}},
        small={"model": {"init_args": {"backbone": "resnet8"}}, "trainer": {"max_epochs": 3}},
        other={"model": {"class_path": "DAN"}},
    )
    first = resolved("fit --config data.yaml --config method.yaml --config small.yaml")
    assert first["model"]["class_path"] == "framework.DANN"
    options = first["model"]["init_args"]
    assert (options["backbone"], options["trade_off"], options["reversal_gamma"]) == ("resnet8", 0.5, 5.0)
    assert first["trainer"]["max_epochs"] == 3

    flags = resolved(
        "fit --config data.yaml --config method.yaml -c small.yaml --model.trade_off 2 --seed_everything 7"
    )
    assert flags["model"]["init_args"]["trade_off"] == 2
    assert flags["model"]["init_args"]["backbone"] == "resnet8"
    assert flags["seed_everything"] == 7

    turned = resolved("fit --config data.yaml --config method.yaml --config small.yaml --config other.yaml")
    assert turned["model"]["class_path"] == "framework.DAN"
    assert turned["model"]["init_args"]["backbone"] == "resnet8"  # what the other class knows too is kept
    assert "reversal_gamma" not in turned["model"]["init_args"]


def test_the_printed_configuration_runs(
    resolved: Callable[[str], dict[str, Any]], command: Callable[[str], int], tmp_path: Path
) -> None:
    printed = resolved("fit " + MODEL + DATA + TRAINER + "--model.optimizer_options.momentum 0.8")
    write(tmp_path, printed=printed)
    assert resolved("fit --config printed.yaml") == printed
    assert command("fit --config printed.yaml") == 0
    assert yaml.safe_load((tmp_path / RUN / "config.yaml").read_text()) == printed


@pytest.mark.parametrize(
    "flag", ["--model.optimizer_options.momentum 0.8", "--model.optimizer_options '{{momentum: 0.8}}'"]
)
def test_options_of_the_optimizer(flag: str, command: Callable[[str], int]) -> None:
    assert command("fit " + MODEL + DATA + TRAINER + flag) == 0
    state = torch.load(f"{RUN}/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {group["momentum"] for group in state["param_groups"]} == {0.8}
    assert {group["name"] for group in state["param_groups"]} == {"backbone", "bottleneck", "head", "alignment"}


def test_callbacks_are_added(resolved: Callable[[str], dict[str, Any]], command: Callable[[str], int]) -> None:
    flags = (
        "--trainer.callbacks+=LearningRateMonitor --trainer.callbacks.logging_interval=step "
        "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/source_accuracy "
        "--trainer.callbacks.mode=max --trainer.callbacks.patience=0 --trainer.max_epochs 6"
    )
    callbacks = resolved("fit " + MODEL + DATA + TRAINER + flags)["trainer"]["callbacks"]
    assert [c["class_path"].rsplit(".", 1)[-1] for c in callbacks] == ["LearningRateMonitor", "EarlyStopping"]
    assert command("fit " + MODEL + DATA + TRAINER + flags) == 0
    assert {"checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= names(Path(RUN))  # and none are taken away
    assert any(name.startswith("lr-SGD") for _, name, _ in rows(Path(RUN)))


@pytest.mark.parametrize(("limit", "batches"), [("1", 1), ("1.0", 9), ("0.5", 4)])
def test_one_batch_is_not_all_batches(limit: str, batches: int, command: Callable[[str], int]) -> None:
    line = "fit " + MODEL + DATA + TRAINER + f"--trainer.max_epochs 1 --trainer.limit_train_batches {limit}"
    assert command(line) == 0
    assert torch.load(f"{RUN}/checkpoints/last.ckpt", weights_only=True)["global_step"] == batches


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "fit --model.help DANN",
            ["--model.trade_off", "--model.reversal_gamma", "Ganin", "--model.optimizer_options"],
        ),
        ("fit --data.help DomainPairDataModule", ["--data.source", "--data.target_test", "--data.crop", "unlabelled"]),
        ("fit --data.help ImageFolderDataModule", ["--data.root", "--data.test_fraction"]),
        ("fit --help", ["--trainer.max_epochs", "--model", "--data", "--config", "--print_config"]),
        ("test --help", ["--ckpt_path"]),
        ("--help", ["fit", "validate", "test", "predict", "--run", "--model.help DANN"]),
    ],
)
def test_help(line: str, words: Iterable[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: framework")
    assert all(word in printed for word in words)


# ---------------------------------------------------------------------- --run
def test_evaluation_of_a_run(run: Path, command: Callable[[str], int], capsys: pytest.CaptureFixture[str]) -> None:
    before = names(run)
    untouched = {name: (run / name).read_bytes() for name in before - {"metrics.csv"}}
    for line in (f"test --run {RUN}", f"validate --run={RUN}/", f"predict --run {run} --ckpt_path best"):
        assert command(line) == 0
    error = capsys.readouterr().err
    assert "dirpath has changed" not in error
    assert names(run) - before >= {
        "config.test_1.yaml",
        "config.validate_1.yaml",
        "config.predict_1.yaml",
        "confusion_matrix.csv",
        "predictions.csv",
    }
    assert {name: (run / name).read_bytes() for name in untouched} == untouched
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    logged = {name for _, name, _ in rows(run)}
    assert {"test/accuracy", "test/macro_f1", "val/source_accuracy"} <= logged
    with (run / "predictions.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 31
    assert yaml.safe_load((run / "config.predict_1.yaml").read_text())["ckpt_path"].endswith("best.ckpt")


def test_flags_win_over_the_run(run: Path, command: Callable[[str], int], domains: Path) -> None:
    assert command(f"predict --run {RUN} --data.predict {domains}/target_test --data.eval_batch_size 3") == 0
    written = yaml.safe_load((run / "config.predict_1.yaml").read_text())
    assert written["data"]["init_args"]["eval_batch_size"] == 3
    with (run / "predictions.csv").open() as file:
        table = list(csv.reader(file))
    assert len(table) == 1 + 15
    assert table[0][:3] == ["path", "class", "probability"]
    assert {row[1] for row in table[1:]} <= {"ant", "bee", "cat"}
    assert command(f"predict --run {RUN}") == 0  # an earlier table is kept
    assert (run / "predictions_1.csv").is_file()


def test_a_run_goes_on_in_its_folder(
    run: Path, command: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    first, configuration, split = rows(run), (run / "config.yaml").read_bytes(), (run / "split.csv").read_bytes()
    last = run / "checkpoints" / "last.ckpt"
    assert command(f"fit --run {RUN}") == 0
    assert "Nothing was left to train" in capsys.readouterr().out
    assert command(f"fit --run {RUN} --trainer.max_epochs 4") == 0
    assert rows(run)[: len(first)] == first
    assert (run / "config.yaml").read_bytes() == configuration
    assert (run / "split.csv").read_bytes() == split
    checkpoint = torch.load(last, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (3, 12)
    assert checkpoint["DomainPairDataModule"]["batches"] == 12
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]


@pytest.mark.parametrize("name", ["lightning_logs/default/version_0", "moved/to/version_7"])
def test_a_run_that_goes_on_remembers_its_best_epoch(
    name: str, run: Path, command: Callable[[str], int], tmp_path: Path
) -> None:
    """Whatever path names the folder, also where it has moved."""
    last, best = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    checkpoint = torch.load(last, weights_only=True)
    (state,) = (s for key, s in checkpoint["callbacks"].items() if key.startswith("BestCheckpoint"))
    (path,) = state["best_k_models"]
    state["best_model_score"] = state["best_k_models"][path] = state["kth_value"] = torch.tensor(99.0)
    torch.save(checkpoint, last)
    unsurpassed = best.read_bytes()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    run.rename(tmp_path / name)
    assert command(f"fit --run {name} --trainer.max_epochs 4") == 0
    assert (tmp_path / name / "checkpoints" / "best.ckpt").read_bytes() == unsurpassed


def test_a_run_from_the_checkpoint_of_another_has_its_own_best_epoch(run: Path, command: Callable[[str], int]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    line = "fit " + MODEL + DATA + TRAINER + f"--ckpt_path {RUN}/checkpoints/last.ckpt --trainer.max_epochs 4"
    assert command(line) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert torch.load(run.parent / "version_1" / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] >= 2


def test_the_trained_network_is_tested(run: Path, command: Callable[[str], int]) -> None:
    line = f"test --model DANN {DATA} --ckpt_path {RUN}/checkpoints/last.ckpt "
    options = "--model.backbone resnet8 --model.bottleneck_features 8 --model.discriminator_features 8 "
    assert command(line + options + "--trainer.accelerator cpu --trainer.enable_progress_bar false") == 0
    assert command(f"test --run {RUN}") == 0

    def accuracy(folder: Path) -> list[str]:
        return [value for _, name, value in rows(folder) if name == "test/calibration_error"]

    assert accuracy(run.parent / "version_1") == accuracy(run)


# ---------------------------------------------------------------------- several source folders
@pytest.mark.parametrize(
    "flags",
    [
        "--data.source '[{d}/source, {d}/target_test]'",
        "--data.source {d}/source --data.source+={d}/target_test",
        "--data.source+={d}/source --data.source+={d}/target_test",
        "--config one.yaml --data.source+={d}/target_test",
        "--config two.yaml",
    ],
)
def test_several_sources_from_flags_and_files(
    flags: str, resolved: Callable[[str], dict[str, Any]], domains: Path, tmp_path: Path
) -> None:
    sources = [f"{domains}/source", f"{domains}/target_test"]
    for name, source in (("one", sources[0]), ("two", sources)):
        write(tmp_path, **{name: {"data": {"class_path": "DomainPairDataModule", "init_args": {"source": source}}}})
    target = f" --data.target {domains}/target"
    first = "" if "--config" in flags else "--data DomainPairDataModule "
    assert resolved("fit " + MODEL + first + flags + target)["data"]["init_args"]["source"] == sources
    one = resolved("fit " + MODEL + first + flags + target + f" --data.source {domains}/source")
    assert one["data"]["init_args"]["source"] == f"{domains}/source"  # a flag without the plus replaces them all


def test_a_run_with_several_sources(
    command: Callable[[str], int], domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [str(domains / "source"), str(domains / "target_test")]
    data = {"class_path": "DomainPairDataModule", "init_args": {"source": sources, "source_val": sources}}
    write(tmp_path, two={"data": data})
    once = TRAINER.replace("limit_train_batches 3", "limit_train_batches 1").replace("max_epochs 2", "max_epochs 1")
    options = DATA.replace("--data.source {d}/source", "").replace("--data DomainPairDataModule", "")
    by_flag = "--data DomainPairDataModule --data.source '[{d}/source, {d}/target_test]' "
    assert command("fit --config two.yaml " + MODEL + options + once + "--trainer.experiment file") == 0
    by_flag += "--data.source_val+={d}/source --data.source_val+={d}/target_test "
    assert command("fit " + MODEL + by_flag + options + once + "--trainer.experiment flags") == 0
    run, same = (tmp_path / "lightning_logs" / name / "version_0" for name in ("file", "flags"))
    assert rows(run) == rows(same)

    # one step more, from the checkpoint, and two at once: the same
    assert command(f"fit --run {run} --trainer.max_epochs 2") == 0
    twice = once.replace("max_epochs 1", "max_epochs 2")
    assert command("fit --config two.yaml " + MODEL + options + twice + "--trainer.experiment whole") == 0
    whole = tmp_path / "lightning_logs" / "whole" / "version_0"
    resumed, uninterrupted = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, whole))
    assert resumed["DomainPairDataModule"] == uninterrupted["DomainPairDataModule"]
    assert resumed["DomainPairDataModule"]["sources"] == [str(Path(folder).resolve()) for folder in sources]
    for name, value in uninterrupted["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert command(f"test --run {run}") == 0
    capsys.readouterr()
    assert command(f"fit --run {run} --trainer.max_epochs 3 --data.source {domains}/source") == 2
    assert "`--data.source` to name as many folders as in the run" in capsys.readouterr().err


# ---------------------------------------------------------------------- images without labels
PRETRAINING = "--model RotationPrediction --model.backbone resnet8 "
UNLABELLED = (
    "--data UnlabelledFolderDataModule --data.folders '[{d}/source, {d}/target]' --data.image_size 16 "
    "--data.crop pad --data.num_workers 0 --data.batch_size 4 "
)
ONE = (
    "--data ImageFolderDataModule --data.root {d}/source --data.image_size 16 --data.num_workers 0 --data.batch_size 4 "
)


@pytest.mark.parametrize(
    "flags", ["--data.folders '[{d}/source, {d}/target]'", "--data.folders {d}/source --data.folders+={d}/target"]
)
def test_folders_from_flags(flags: str, resolved: Callable[[str], dict[str, Any]], domains: Path) -> None:
    data = "--data UnlabelledFolderDataModule "
    both = resolved("fit " + PRETRAINING + data + flags)["data"]["init_args"]["folders"]
    assert both == [f"{domains}/source", f"{domains}/target"]
    one = resolved("fit " + PRETRAINING + data + flags + " --data.folders {d}/source")["data"]["init_args"]["folders"]
    assert one == f"{domains}/source"


def test_pretraining_needs_no_classes_and_resumes(
    command: Callable[[str], int], domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = TRAINER.replace("max_epochs 2", "max_epochs 1")
    assert command("fit " + PRETRAINING + UNLABELLED + once) == 0
    run, whole = tmp_path / RUN, tmp_path / "lightning_logs" / "whole" / "version_0"
    assert command(f"fit --run {run} --trainer.max_epochs 2") == 0
    assert command("fit " + PRETRAINING + UNLABELLED + TRAINER + "--trainer.experiment whole") == 0
    resumed, uninterrupted = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, whole))
    assert resumed["UnlabelledFolderDataModule"] == uninterrupted["UnlabelledFolderDataModule"]
    assert resumed["UnlabelledFolderDataModule"]["folders"] == [f"{domains}/source", f"{domains}/target"]
    for name, value in uninterrupted["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert rows(run) == rows(whole)
    assert "num_classes" not in resumed["hyper_parameters"]
    assert command(f"validate --run {run}") == 0
    assert {"val/loss", "val/rotation_accuracy"} <= {name for _, name, _ in rows(run)}
    # and it starts a classifier
    capsys.readouterr()
    line = "fit --model ResidualClassifier --model.backbone resnet8 " + ONE + once
    assert command(line + f"--model.init_from {run}/checkpoints/last.ckpt") == 0
    assert "backbone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "fit --model ResidualClassifier " + UNLABELLED,
            "Expected `--data` to serve a LabelledBatch, on which ResidualClassifier trains, but "
            "UnlabelledFolderDataModule serves an UnlabelledBatch. Take `--data ImageFolderDataModule`.",
        ),
        ("fit " + MODEL + UNLABELLED, "serve a DomainBatch, on which DANN trains,"),
        ("fit " + MODEL + UNLABELLED, "Take `--data DomainPairDataModule`."),
        (
            "fit " + PRETRAINING + ONE,
            "Expected `--data` to serve an UnlabelledBatch, on which RotationPrediction trains, but "
            "ImageFolderDataModule serves a LabelledBatch. Take `--data UnlabelledFolderDataModule`.",
        ),
        ("fit " + PRETRAINING + DATA, "DomainPairDataModule serves a DomainBatch. Take `--data UnlabelledFolderDataM"),
        ("test --trainer.fast_dev_run true --model ResidualClassifier " + UNLABELLED, "to hold what `test` needs, but"),
        ("predict --trainer.fast_dev_run true " + MODEL + UNLABELLED, "Take `--data DomainPairDataModule`."),
        (
            "test --trainer.fast_dev_run true " + PRETRAINING + UNLABELLED,
            "Expected a classifier to `test`, but RotationPrediction knows no classes. Start one from its checkpoint",
        ),
        (
            "predict --trainer.fast_dev_run true " + PRETRAINING + ONE,
            "Expected a classifier to `predict`, but Rotation",
        ),
        ("fit " + PRETRAINING + UNLABELLED + "--data.labels_per_class 2", "Expected no `--data.labels_per_class` with"),
        ("fit " + PRETRAINING + UNLABELLED + "--data.batch_size 5", "`--data.batch_size` to be a multiple of 2,"),
        ("fit " + PRETRAINING + UNLABELLED + "--data.views 2", "Expected `--data.views` to be 1, on which Rotation"),
        ("fit " + PRETRAINING + UNLABELLED + "--data.crop_scale 0.2", "Expected `--data.crop_scale` to be a list"),
        ("fit " + PRETRAINING + UNLABELLED + "--data.crop_scale '[0.5, 2]'", "`--data.crop_scale` to be two shares of"),
        (
            "fit " + PRETRAINING + UNLABELLED + "--data.blur 7",
            "Expected `--data.blur` to be a probability, from 0 to 1",
        ),
        ("fit " + PRETRAINING + "--data UnlabelledFolderDataModule", "Expected `--data.folders`, which"),
        ("fit " + PRETRAINING + UNLABELLED + "--model.num_classes 3", "`--model.num_classes` to be an option of Rotat"),
    ],
)
def test_what_does_not_go_together(
    line: str, message: str, command: Callable[[str], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(line + " --trainer.accelerator cpu") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("version_*"))  # and leaves no run


# ---------------------------------------------------------------------- start
@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_light_start(argument: str) -> None:
    code = (
        "import json, sys\n"
        "from framework.__main__ import main\n"
        f"code = main([{argument!r}])\n"
        "print(json.dumps([code, [m for m in ('torch', 'lightning', 'torchvision', 'numpy') if m in sys.modules]]))"
    )
    *_, last = in_a_new_process(code).splitlines()
    assert json.loads(last) == [0, []]


def test_both_names_of_the_command() -> None:
    script = Path(sys.executable).with_name("framework")
    printed = [
        subprocess.run([*line, "--version"], capture_output=True, text=True, check=True, timeout=300).stdout
        for line in ([sys.executable, "-m", "framework"], *([[str(script)]] if script.exists() else []))
    ]
    assert len(set(printed)) == 1
    assert printed[0].strip().count(".") == 2


def test_no_arguments_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: framework" in capsys.readouterr().out


def test_runs_outside_the_main_thread(command: Callable[[str], int]) -> None:
    with ThreadPoolExecutor(1) as pool:  # where no signal handler can be set
        assert pool.submit(command, "fit " + MODEL + DATA + TRAINER + "--trainer.fast_dev_run true").result() == 0
