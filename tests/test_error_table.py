"""A user's mistakes and what the command line says: one or two lines that name the flag, exit code 2, no traceback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from framework.__main__ import main
from framework.networks import create_backbone

PAIR = (
    "--model DANN --model.backbone resnet8 --model.bottleneck_features 8 --model.discriminator_features 8 "
    "--data DomainPairDataModule --data.source {d}/source --data.target {d}/target --data.image_size 16 "
    "--data.crop none --data.num_workers 0 --data.batch_size 4 --trainer.max_epochs 1 --trainer.accelerator cpu "
    "--trainer.limit_train_batches 2 --trainer.enable_progress_bar false "
)
FOLDER = (
    "--model ResidualClassifier --model.backbone resnet8 --data ImageFolderDataModule --data.root {w}/one "
    "--data.image_size 16 --data.crop none --data.num_workers 0 --data.batch_size 4 --trainer.max_epochs 1 "
    "--trainer.accelerator cpu --trainer.limit_train_batches 2 --trainer.enable_progress_bar false "
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, domains: Path) -> Path:
    """Folder with a finished run of DANN, ``lightning_logs/default/version_0``, and one of ResidualClassifier."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(domains / "source", folder / "one")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for line in (PAIR, FOLDER):
            assert main(["fit", *line.format(d=domains, w=folder).split()]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def w(tmp_path_factory: pytest.TempPathFactory, domains: Path, images: Callable[..., Path]) -> Path:
    """Folder of wrong folders and wrong files."""
    root = tmp_path_factory.mktemp("wrong")
    images(root / "other_classes", ["ant", "bee", "dog"], count=2)
    images(root / "empty_class", ["ant", "bee"], count=4)
    (root / "empty_class" / "cat").mkdir()
    images(root / "flat", None, count=4)
    for name in ("ant", "bee"):
        (root / "no_images" / name).mkdir(parents=True)
    (root / "empty").mkdir()
    shutil.copytree(domains / "source", root / "corrupt")
    (root / "corrupt" / "bee" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    images(root / "truncated", None, count=8)
    Image.effect_noise((64, 64), 90).save(root / "truncated" / "long.jpg")
    whole = (root / "truncated" / "long.jpg").read_bytes()
    (root / "truncated" / "long.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "file.txt").write_text("no folder")
    (root / "not.yaml").write_text("model: {class_path: DANN\n  x: ][")
    (root / "list.yaml").write_text("- model\n- data\n")
    (root / "key.yaml").write_text("trainer: {max_epoch: 3}\n")
    (root / "option.yaml").write_text("model: {class_path: DANN, init_args: {backbnoe: resnet8}}\n")
    (root / "broken.ckpt").write_bytes(b"PK\x03\x04 and then nothing")
    (root / "empty.ckpt").touch()
    torch.save({"weights": 1}, root / "foreign.ckpt")
    torch.save(create_backbone("resnet20").state_dict(), root / "resnet20.pth")
    return root


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FRAMEWORK_DEBUG", raising=False)
    return tmp_path


# each row: arguments ({d}: right folders, {w}: wrong ones, {r}: the folder with the runs), and regular expressions that
# must all be found in the message
CONFIGURATION = {
    "no command": ("", r"^usage: framework"),
    "unknown command": ("tset " + PAIR, "Expected a command.*'tset'", "Did you mean 'test'"),
    "option before the command": ("--model DANN fit", "Expected a command", "fit, validate, test, predict"),
    "unknown option": ("fit " + PAIR + "--foo 1", "known option", "`--foo`", "framework fit --help"),
    "misspelt option": ("fit " + PAIR + "--dat.source x", "`--dat.source`", "Did you mean `--data.source`"),
    "abbreviation": ("fit " + PAIR + "--trainer.max_epoch 3", "`--trainer.max_epoch`", "`--trainer.max_epochs`"),
    "stray word": ("fit " + PAIR + "photos", "`--name value`", "'photos'"),
    "no value": ("fit " + PAIR + "--data.source", "Expected a value after `--data.source`"),
    "unknown model": ("fit " + PAIR + "--model DANNN", "`--model`", "'DANNN'", "Did you mean 'DANN'"),
    "no model of that kind": ("fit " + PAIR + "--model torch.nn.Linear", "`--model`", "LightningModule", "'DANN'"),
    "unknown package": ("fit " + PAIR + "--model mypackage.MyModel", "`--model`", "'mypackage.MyModel'"),
    "base class": ("fit " + PAIR + "--model DomainAdaptation", "`--model`", "DomainAdaptation, a base", "SourceOnly"),
    "unknown data": ("fit " + PAIR + "--data DomainPairs", "`--data`", "Did you mean 'DomainPairDataModule'"),
    "unknown option of the model": (
        "fit " + PAIR + "--model.backbnoe resnet8",
        "`--model.backbnoe`",
        "DANN",
        "Did you mean `--model.backbone`",
        "--model.help DANN",
    ),
    "option of another model": ("fit " + PAIR + "--model.estimator biased", "`--model.estimator`", "option of DANN"),
    "no model": (
        "fit --data DomainPairDataModule --data.source a --data.target b",
        "`--model` to name a class",
        "DANN",
    ),
    "option without model": ("fit --model.backbone resnet8", "`--model` to name a class", "before `--model.backbone`"),
    "no data": ("fit --model DANN", "`--data` to name a class", "ImageFolderDataModule"),
    "neither": ("fit", "`--model` to name a class", "`--data` to name a class"),
    "no source": (
        "fit --model DANN --data DomainPairDataModule --data.target {d}/target",
        "Expected `--data.source`, which DomainPairDataModule needs, but got none",
    ),
    "number expected": ("fit " + PAIR + "--model.trade_off high", "`--model.trade_off` to be a number", "'high'"),
    "whole number expected": ("fit " + PAIR + "--trainer.max_epochs 1.5", "`--trainer.max_epochs`.*whole", "'1.5'"),
    "switch expected": ("fit " + PAIR + "--data.horizontal_flip maybe", "horizontal_flip` to be true or false"),
    "list expected": ("fit " + PAIR + "--data.mean [0.5,0.5]", "`--data.mean`", "3", r"\[0.5, 0.5\]"),
    "mapping expected": ("fit " + PAIR + "--model.optimizer_options momentum", "optimizer_options` to be a mapping"),
    "unknown choice": ("fit " + PAIR + "--data.crop round", "`--data.crop`.*'random_resized', 'pad'", "'round'"),
    "no such configuration": ("fit --config none.yaml", "`--config`.*none.yaml' does not exist"),
    "no YAML": ("fit --config {w}/not.yaml", "`--config` to be YAML", "not.yaml", "line 2"),
    "list for a configuration": ("fit --config {w}/list.yaml", "`--config` to hold options by name", "list.yaml"),
    "unknown key": ("fit " + PAIR + "--config {w}/key.yaml", "'trainer.max_epoch'", "`trainer.max_epochs`"),
    "unknown option in a file": ("fit --config {w}/option.yaml " + PAIR, "`--model.backbnoe`", "`--model.backbone`"),
    "unknown name for help": ("fit --model.help DANNN", "`--model`", "Did you mean 'DANN'"),
    "no name for help": ("fit --model.help", "Expected a name after `--model.help`", "DANN"),
    "unknown callback": ("fit " + PAIR + "--trainer.callbacks+=EarlyStop", "Did you mean 'EarlyStopping'"),
    "callback without its option": (
        "fit " + PAIR + "--trainer.callbacks+=EarlyStopping",
        "`--trainer.callbacks.monitor`, which EarlyStopping needs",
    ),
    "seed out of range": ("fit " + PAIR + "--seed_everything -1", "`--seed_everything`", "-1"),
}

DATA = {
    "source missing": ("fit " + PAIR + "--data.source {w}/none", "`--data.source`", "/none' does not exist"),
    "source is a file": ("fit " + PAIR + "--data.source {w}/file.txt", "`--data.source`", "file.txt' is a file"),
    "no class folders": ("fit " + PAIR + "--data.source {w}/flat", "`--data.source`.*two classes", "found 0.*/flat'"),
    "empty class": ("fit " + PAIR + "--data.source {w}/empty_class", "`--data.source`", "none in 'cat'"),
    "no images": ("fit " + PAIR + "--data.source {w}/no_images", "`--data.source` to hold images", "/no_images'"),
    "no source folder": ("fit " + PAIR + "--data.source []", "`--data.source`", "an empty list"),
    "number for a source folder": ("fit " + PAIR + "--data.source [a,12]", "`--data.source` to be a text", "'12'"),
    "source folder twice": (
        "fit " + PAIR + "--data.source+={d}/source/",
        "`--data.source` to name each folder once",
        "/source/', which is '.*/source' again",
    ),
    "sources do not share a batch": (
        "fit " + PAIR + "--data.source+={d}/target_test --data.batch_size 5",
        "`--data.batch_size` to be a multiple of 2, the folders of `--data.source`",
        "got 5. Take 4 or 6",
    ),
    "second source missing": ("fit " + PAIR + "--data.source+={w}/none", "`--data.source`", "/none' does not exist"),
    "second source of other classes": (
        "fit " + PAIR + "--data.source+={w}/other_classes",
        "every folder of `--data.source` to hold the same classes",
        "/other_classes' are missing: 'cat'",
        "not under '.*/source': 'dog'",
    ),
    "second source with an empty class": (
        "fit " + PAIR + "--data.source+={w}/empty_class",
        "`--data.source`",
        "none in 'cat' under '.*/empty_class'",
    ),
    "corrupt file in the second source": (
        "fit " + PAIR + "--data.source+={w}/corrupt",
        "`--data.source`",
        "1 of 39",
        "corrupt/bee/3.png",
    ),
    "second source smaller than its share": (
        "fit " + PAIR + "--data.source+={d}/target_test --data.batch_size 32 --data.target_batch_size 4",
        "every folder of `--data.source` to hold its share of a batch, 16 of `--data.batch_size` = 32",
        "15 training images are under '.*/target_test'",
        "Lower `--data.batch_size` or `--data.val_fraction`",
    ),
    "target empty": ("fit " + PAIR + "--data.target {w}/empty", "`--data.target` to hold images", "/empty'"),
    "corrupt PNG": ("fit " + PAIR + "--data.source {w}/corrupt", "`--data.source`", "1 of 39", "bee/3.png"),
    "truncated JPEG": ("fit " + PAIR + "--data.target {w}/truncated", "`--data.target`", "1 of 9", "long.jpg"),
    "other classes": (
        "fit " + PAIR + "--data.target_test {w}/other_classes",
        "`--data.target_test`",
        "missing: 'cat'",
        "training: 'dog'",
    ),
    "source smaller than a batch": (
        "fit " + PAIR + "--data.batch_size 37 --data.target_batch_size 4",
        "`--data.source` to hold at least one batch, `--data.batch_size` = 37",
        "Lower `--data.batch_size`",
    ),
    "target smaller than a batch": (
        "fit " + PAIR + "--data.target_batch_size 40",
        "`--data.target` to hold at least one batch, `--data.target_batch_size` = 40",
    ),
    "no labelled target": (
        "test --run {r}/lightning_logs/default/version_0",
        "`--data.target_test` to be a labelled folder",
        "got none",
    ),
    "fraction out of range": ("fit " + PAIR + "--data.val_fraction 1.5", r"`--data.val_fraction`.*\[0, 1\).*1.5"),
    "batch of none": ("fit " + PAIR + "--data.batch_size 0", "`--data.batch_size` to be at least 1, but got 0"),
    "crop larger than image": ("fit " + PAIR + "--data.resize_size 8", "`--data.resize_size`", "`--data.image_size`"),
    "classifier on two domains": (
        "fit "
        + PAIR.replace("--model DANN", "--model ResidualClassifier")
        .replace("--model.bottleneck_features 8", "")
        .replace("--model.discriminator_features 8", ""),
        "`--data` to serve a LabelledBatch",
        "ResidualClassifier",
        "DomainPairDataModule",
    ),
    "adaptation on one folder": (
        "fit " + FOLDER.replace("ResidualClassifier", "DANN").replace("{w}/one", "{d}/source"),
        "`--data` to serve a DomainBatch",
        "DANN",
        "ImageFolderDataModule",
    ),
}

MODEL = {
    "unknown backbone": ("fit " + PAIR + "--model.backbone resnet19", "`--model.backbone`", "'resnet19'", "'resnet18'"),
    "unknown weights": (
        "fit " + PAIR + "--model.backbone resnet18 --model.weights IMAGENET",
        "`--model.weights`",
        "'IMAGENET1K_V1'",
        "got 'IMAGENET'",
    ),
    "no published weights": ("fit " + PAIR + "--model.weights DEFAULT", "`--model.weights`", "no published weights"),
    "weights file missing": ("fit " + PAIR + "--model.weights none.pth", "`--model.weights`", "'none.pth'"),
    "weights of another network": (
        "fit " + PAIR + "--model.weights {w}/resnet20.pth",
        "`--model.weights`.*resnet20.pth",
        "unexpected",
    ),
    "weights file broken": ("fit " + PAIR + "--model.weights {w}/broken.ckpt", "`--model.weights`.*broken.ckpt"),
    "unknown option of the backbone": (
        "fit " + PAIR + "--model.backbone_options.depth 3",
        "`--model.backbone_options`",
        "'depth'",
        "stochastic_depth",
    ),
    "unknown optimizer": ("fit " + PAIR + "--model.optimizer Adm", "`--model.optimizer`", "'Adm'", "'Adam'"),
    "unknown option of the optimizer": (
        "fit " + PAIR + "--model.optimizer Adam --model.optimizer_options.momentum 0.9",
        "`--model.optimizer_options`",
        "Adam",
        "'momentum'",
        "'betas'",
    ),
    "wrong option of the optimizer": (
        "fit " + PAIR + "--model.optimizer_options.momentum -1",
        "`--model.optimizer_options`",
        "momentum",
    ),
    "unknown schedule": ("fit " + PAIR + "--model.schedule cosin", "`--model.schedule`", "'cosine'", "'cosin'"),
    "steps without milestones": ("fit " + PAIR + "--model.schedule step", "milestones", "--model.schedule step"),
    "wrong option of the schedule": (
        "fit " + PAIR + "--model.schedule inverse_decay --model.schedule_options.gamma fast",
        "`--model.schedule_options`",
        "'fast'",
    ),
    "option of another schedule": (
        "fit " + PAIR + "--model.schedule cosine --model.schedule_options.gamma 0.1",
        "`--model.schedule_options`",
        "'cosine'",
        "'gamma'",
    ),
    "classes by hand": ("fit " + PAIR + "--model.num_classes 3", "no `--model.num_classes`", "from the data"),
    "negative weight": ("fit " + PAIR + "--model.trade_off -1", "`--model.trade_off` to be 0 or more.*-1"),
    "source only, two norms": (
        "fit "
        + PAIR.replace("--model DANN", "--model SourceOnly").replace("--model.discriminator_features 8", "")
        + "--model.batch_norm domain_specific",
        "`--model.batch_norm`",
        "SourceOnly",
    ),
    "linear time, unequal batches": (
        "fit "
        + PAIR.replace("--model DANN", "--model DAN").replace("--model.discriminator_features 8", "")
        + "--model.estimator linear_time --data.target_batch_size 5",
        "`--data.target_batch_size` to equal `--data.batch_size`",
        "5 and 4",
    ),
    "width below one": (
        "fit " + PAIR + "--model.discriminator_features 0",
        "`--model.discriminator_features` to be at least 1.*got 0",
    ),
}

RUN = {
    "run without configuration": ("test --run {d}", "`--run`", "holds no config.yaml"),
    "run that is not there": ("fit --run none", "`--run`", "'none'"),
    "run without value": ("fit --run", "Expected a value after `--run`"),
    "no checkpoint named": ("test " + PAIR, "`--run` or `--ckpt_path`", "got neither"),
    "checkpoint missing": ("fit " + PAIR + "--ckpt_path none.ckpt", "`--ckpt_path`", "'none.ckpt' does not exist"),
    "checkpoint broken": ("fit " + PAIR + "--ckpt_path {w}/broken.ckpt", "`--ckpt_path`", "broken.ckpt'.*read"),
    "checkpoint empty": ("fit " + PAIR + "--ckpt_path {w}/empty.ckpt", "`--ckpt_path`", "empty.ckpt'.*read"),
    "checkpoint foreign": ("fit " + PAIR + "--ckpt_path {w}/foreign.ckpt", "`--ckpt_path`", "foreign.ckpt'.*read"),
    "checkpoint of another class": (
        "fit " + PAIR + "--ckpt_path {r}/lightning_logs/default/version_1/checkpoints/last.ckpt",
        "`--ckpt_path`",
        "`--model` DANN",
        "one of ResidualClassifier",
    ),
    "checkpoint of another width": (
        "test --run {r}/lightning_logs/default/version_0 --data.target_test {d}/target_test "
        "--model.bottleneck_features 16",
        "`--model` options",
        "bottleneck",
    ),
    "without end": ("fit " + PAIR + "--trainer.max_epochs -1", "`--trainer.max_epochs` or `--trainer.max_steps`"),
    "negative length": ("fit " + PAIR + "--trainer.max_epochs -5", "`--trainer.max_epochs`", "-5"),
    "no such device": ("fit " + PAIR + "--trainer.accelerator gpx", "`--trainer.accelerator`", "gpx"),
    "another seed": (
        "fit " + PAIR + "--ckpt_path {r}/lightning_logs/default/version_0/checkpoints/last.ckpt "
        "--trainer.max_epochs 2 --seed_everything 5",
        "`--seed_everything 0`",
        "got 5",
    ),
    "another number of sources": (
        "fit --run {r}/lightning_logs/default/version_0 --trainer.max_epochs 2 --data.source+={d}/target_test",
        "`--data.source` to name as many folders as in the run of the checkpoint, 1, but got 2",
    ),
    "shorter than it is": (
        "fit --run {r}/lightning_logs/default/version_0 --trainer.max_epochs 0",
        "`--trainer.max_epochs`",
        "got 0",
    ),
    "logs cannot be written": ("fit " + PAIR + "--trainer.experiment file/run", "lightning_logs/file", "experiment`"),
}


def one_message(error: str) -> str:
    """What the command line said; other lines are Lightning's warnings."""
    assert "Traceback" not in error
    assert error.count("framework: error: ") == 1, error
    message = error.split("framework: error: ", 1)[1].strip()
    assert len(message.splitlines()) <= 2, message
    assert len(message) < 800, message
    return message


@pytest.mark.parametrize("mistake", [*CONFIGURATION, *DATA, *MODEL, *RUN])
def test_mistakes(
    mistake: str,
    domains: Path,
    w: Path,
    runs: Path,
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    command, *expected = (CONFIGURATION | DATA | MODEL | RUN)[mistake]
    if mistake == "logs cannot be written":
        (elsewhere / "lightning_logs").mkdir()
        (elsewhere / "lightning_logs" / "file").touch()
    files = sorted(runs.rglob("*"))
    capsys.readouterr()
    assert main(command.format(d=domains, w=w, r=runs).split()) == 2
    printed = capsys.readouterr()
    message = printed.out if mistake == "no command" else one_message(printed.err)
    for pattern in expected:
        assert re.search(pattern, message, re.S), f"{pattern!r} not in {message!r}"
    assert not list(elsewhere.glob("lightning_logs/**/version_*")), "a mistake left a run behind"
    if "--run" not in command:
        assert sorted(runs.rglob("*")) == files


def test_table_is_large() -> None:
    assert len({**CONFIGURATION, **DATA, **MODEL, **RUN}) == sum(map(len, (CONFIGURATION, DATA, MODEL, RUN))) >= 25


@pytest.mark.parametrize("flag", ["source", "target"])
def test_unreadable_folder(
    flag: str, domains: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = str(domains / flag)  # permissions do not stop root

    def refusing(real: Callable[..., object]) -> Callable[..., object]:
        def scandir(path: str | Path = ".") -> object:
            if str(path) == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return scandir

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    assert main(["fit", *PAIR.format(d=domains).split()]) == 2
    message = one_message(capsys.readouterr().err)
    assert f"`--data.{flag}`" in message
    assert closed in message
    assert "Permission denied" in message


def test_split_that_has_changed(
    domains: Path, elsewhere: Path, images: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images(elsewhere / "one", ["ant", "bee"], count=10)
    line = FOLDER.format(w=elsewhere)
    assert main(["fit", *line.split()]) == 0
    run = "lightning_logs/default/version_0"
    assert main(["test", "--run", run]) == 0
    (elsewhere / "one" / "ant" / "0.png").rename(elsewhere / "one" / "ant" / "new.png")
    assert main(["test", "--run", run]) == 2
    message = one_message(capsys.readouterr().err)
    assert "split of the run" in message
    assert str(elsewhere / "one") in message
    assert "`--data.val_fraction`" in message


@pytest.mark.parametrize("workers", ["0", "1", "1 --data.workers threads"])
def test_unchecked_corrupt_file(
    workers: str, domains: Path, w: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--data.source {w}/corrupt --data.check_images false --data.num_workers {workers} "
    epochs = "--trainer.limit_train_batches 1.0 --data.steps_per_epoch 20"
    assert main(["fit", *(PAIR + flags + epochs).format(d=domains).split()]) == 2
    message = one_message(capsys.readouterr().err)
    assert "bee/3.png" in message
    assert "--data.check_images" in message


def test_early_stopping_on_what_is_not_logged(
    domains: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/acc"
    assert main(["fit", *(PAIR + flags).format(d=domains).split()]) == 2
    message = one_message(capsys.readouterr().err)
    assert "val/acc" in message
    assert "val/source_accuracy" in message


def test_debug_shows_the_traceback(
    elsewhere: Path, domains: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAMEWORK_DEBUG", "1")
    for flags in ("--model.backbone resnet19", "--model.trade_off high", "--data.source none"):
        assert main(["fit", *(PAIR + flags).format(d=domains).split()]) == 2
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("row", ["abbreviation", "unknown backbone"])
def test_in_a_process_of_its_own(row: str, domains: Path, w: Path, elsewhere: Path) -> None:
    command, *expected = (CONFIGURATION | DATA | MODEL | RUN)[row]
    line = [sys.executable, "-m", "framework", *command.format(d=domains, w=w).split()]
    done = subprocess.run(line, cwd=elsewhere, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"framework: error: [^\n]*\n", done.stderr), done.stderr
    assert all(re.search(pattern, done.stderr) for pattern in expected)
    assert not list(elsewhere.iterdir())
