"""What the READMEs show is run or parsed: commands, Python, YAML, paths and tables."""

from __future__ import annotations

import ast
import gc
import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import contract
import fuse
import online_probe_ddp_job
import pretraining_contract
import pytest
import transfer_contract
import yaml
from lightning.pytorch.loggers import CSVLogger

import framework.fusion
import framework.trainer
from framework.__main__ import main
from framework.modules import AlignmentSum
from framework.modules.transfer.base import Policy
from framework.networks.residual import RESIDUAL_NETWORKS

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, "experiments": (REPOSITORY / "experiments" / "README.md").read_text(encoding="utf-8")}
SMALL = shlex.split(
    "--data.image_size 16 --data.batch_size 4 --data.num_workers 0 --model.backbone resnet8 --model.weights none "
    "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.max_epochs 1 "
    "--trainer.limit_train_batches 2 --trainer.log_every_n_steps 1"
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M)


def commands(page: str) -> list[list[str]]:
    """The words of every command in the page's shell blocks."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table whose head begins so."""
    lines = page.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in rows]


ALL = [(name, words) for name, page in PAGES.items() for words in commands(page)]
FRAMEWORK = [words for _, words in ALL if words[0] == "framework" or words[:3] == ["python", "-m", "framework"]]
PYTHON = blocks(README, "python")
EXAMPLE = next(block for block in PYTHON if "class DDC" in block)


# ---------------------------------------------------------------------- folders
@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, images: Callable[..., Path]) -> Path:
    """A working directory with the folders and the runs that the pages name."""
    root = tmp_path_factory.mktemp("readme")
    classes = ["0", "1"]
    for number, folder in enumerate(("mnist/train", "optdigits/train", "mnist_m/train")):
        images(root / "data" / "digits" / folder, classes, count=36, size=16, seed=number)  # batches of 64
    for folder in ("mnist/test", "optdigits/test", "mnist_m/test"):
        images(root / "data" / "digits" / folder, classes, count=2, size=16)
    for folder in ("photos", "sketches", "folder"):
        images(root / "path" / "to" / folder, classes, count=2)
    images(root / "path" / "to" / "labelled", classes, count=20)  # a part of it is held out
    before = Path.cwd()
    os.chdir(root)
    try:
        configs = [f"experiments/{part}.yaml" for part in ("methods/dann", "data/mnist_to_mnist_m")]
        assert main(["fit", *(w for c in configs for w in ("--config", str(REPOSITORY / c))), *SMALL]) == 0
    finally:
        os.chdir(before)
    shutil.copytree(REPOSITORY / "experiments", root / "experiments")
    run = root / "lightning_logs" / "default" / "version_0"
    for _, words in ALL:
        if "--run" in words and not (copy := root / words[words.index("--run") + 1]).exists():
            shutil.copytree(run, copy)
    return root


@pytest.fixture
def here(there: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(there)
    return there


# ---------------------------------------------------------------------- commands
def test_the_pages_have_commands() -> None:
    assert len(FRAMEWORK) >= 15
    subcommands = {words[1] if words[0] == "framework" else words[3] for words in FRAMEWORK}
    assert subcommands == {"fit", "validate", "test", "predict"}


@pytest.mark.parametrize("words", FRAMEWORK, ids=lambda words: " ".join(words)[:120])
def test_every_command_parses(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = words[1:] if words[0] == "framework" else words[3:]
    if any(word.endswith(("--help", ".help")) for word in arguments):
        assert main(arguments) == 0
        assert "usage" in capsys.readouterr().out
        return
    assert main([*arguments, "--print_config"]) == 0, capsys.readouterr().err
    configuration = yaml.safe_load(capsys.readouterr().out)
    assert configuration["model"]["class_path"]
    assert configuration["data"]["class_path"]
    for flag, value in itertools.pairwise(arguments):
        if flag.startswith("--trainer.callbacks+="):
            added = [callback["class_path"].rsplit(".", 1)[-1] for callback in configuration["trainer"]["callbacks"]]
            assert flag.removeprefix("--trainer.callbacks+=") in added
        elif flag.startswith("--trainer.") and not flag.startswith("--trainer.callbacks"):
            assert str(configuration["trainer"][flag.removeprefix("--trainer.")]) == value


@pytest.mark.parametrize(
    "words",
    [words for words in FRAMEWORK if words[1] == "fit" and any("/pretraining/" in word for word in words)],
    ids=lambda words: " ".join(words)[:120],
)
def test_every_command_of_pretraining_runs(words: list[str], here: Path) -> None:
    """A batch of each, on the folders that it names, with a network and a task for small images."""
    file = next(here / word for word in words if "/pretraining/" in word)
    known = yaml.safe_load(file.read_text())["model"]["init_args"]
    task = [w for key, v in pretraining_contract.SMALL.items() if key in known for w in (f"--model.{key}", str(v))]
    assert main([*words[1:], *SMALL, *task, "--trainer.fast_dev_run", "true"]) == 0


@pytest.mark.parametrize(("page", "words"), ALL, ids=lambda value: " ".join(value)[:80])
def test_every_other_command_exists(page: str, words: list[str]) -> None:
    if words in FRAMEWORK:
        return
    if words[:2] == ["pip", "install"]:
        project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
        extras = re.findall(r"^(\w+) = ", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M)
        assert words[2] == "-e"
        assert set(re.findall(r"\[(\w+)\]", words[3])) <= set(extras)
    elif words[0] in ("bash", "python"):
        script = REPOSITORY / words[1]
        assert script.is_file()
        source = script.read_text(encoding="utf-8")
        for flag in (word for word in words[2:] if word.startswith("--")):
            assert f'"{flag}"' in source or f"{flag} " in source
    else:
        assert words[:2] == ["tensorboard", "--logdir"]
    if words[-1] == "--all":
        assert "--all" in (REPOSITORY / "scripts" / "test.sh").read_text(encoding="utf-8")


def test_what_a_run_leaves_behind(here: Path) -> None:
    run = here / "lightning_logs" / "default" / "version_0"
    quiet = ["--run", str(run), "--trainer.enable_progress_bar", "false"]
    for command in ("test", "validate", "predict"):
        assert main([command, *quiet]) == 0
    named = [row[0].strip("`") for row in table(README, "file")]
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= set(named)
    assert [name for name in named if not (run / name).is_file()] == []

    logged = {line.split(",")[1] for line in (run / "metrics.csv").read_text().splitlines()[1:]}
    general = [name for row in table(README, "scalar") for name in quoted_names(row[0])]
    own = [name for row in table(README, "diagnostic") for name in quoted_names(row[0])]
    patterns = [re.sub("<[a-z]+>", "[a-z_]+", name) for name in [*general, *own]]
    assert [name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []
    missing = {
        name for name in general if not any(re.fullmatch(re.sub("<[a-z]+>", "[a-z_]+", name), x) for x in logged)
    }
    of_others = {"val/accuracy", "val/loss", "train/regularization"}  # of classifiers, of transfer
    assert missing == of_others | {f"val/{name}" for name in online_probe_ddp_job.NAMES}


# ---------------------------------------------------------------------- Python
@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that stop after a batch, whatever they are asked for."""
    original = framework.trainer.Trainer.__init__

    def initialise(self: Any, **options: Any) -> None:
        short = {"max_epochs": 1, "limit_train_batches": 1, "accelerator": "cpu", "enable_progress_bar": False}
        original(self, **{**options, **short})

    monkeypatch.setattr(framework.trainer.Trainer, "__init__", initialise)


def test_every_python_block_runs(here: Path, brief: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(PYTHON) >= 4
    for block in PYTHON:
        if block is not EXAMPLE:  # has a test of its own
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "test/accuracy" in capsys.readouterr().out


def test_the_readme_shows_the_quickstart() -> None:
    def calls(source: str) -> dict[str, dict[str, str]]:
        """The options of data and model as they are written; folders and length are arguments of the script."""
        found = {}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("DANN", name):
                options = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
                found[node.func.id] = {k: v for k, v in options.items() if k not in varying}
        return found

    name, varying = "DomainPairDataModule", {"source", "target", "target_test", "steps_per_epoch"}
    script = (REPOSITORY / "experiments" / "quickstart.py").read_text(encoding="utf-8")
    assert calls(PYTHON[0]) == calls(script)
    assert calls(script).keys() == {"DANN", name}


@pytest.fixture
def example(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example of a method as an importable module; gone again afterwards, so that other tests do not find it."""
    (here / "readme_example.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(str(here))
    yield "readme_example"
    sys.modules.pop("readme_example", None)
    gc.collect()


def test_the_example_of_a_method_is_a_method(example: str, here: Path) -> None:
    written = yaml.safe_load(next(block for block in blocks(README, "yaml") if "class_path: DDC" in block))
    written["model"]["class_path"] = f"{example}.DDC"
    (here / "ddc.yaml").write_text(yaml.safe_dump(written))
    data = here / "experiments" / "data" / "mnist_to_optdigits.yaml"
    arguments = ["fit", "--config", "ddc.yaml", "--config", str(data), *SMALL, "--trainer.experiment", "ddc"]
    assert main(arguments) == 0
    run = here / "lightning_logs" / "ddc" / "version_0"
    assert "train/mean_distance" in (run / "metrics.csv").read_text()
    configuration = yaml.safe_load((run / "config.yaml").read_text())
    assert configuration["model"]["init_args"]["trade_off"] == written["model"]["init_args"]["trade_off"]
    assert main(["test", "--run", str(run), "--trainer.enable_progress_bar", "false"]) == 0


# ---------------------------------------------------------------------- paths and tables
@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    home = REPOSITORY if page == "README.md" else REPOSITORY / page
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (home / link).exists()] == []
    quoted = {word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
    named = {word for word in quoted if re.match(r"(experiments|framework|scripts|tests|\.ci)/", word)}
    if page == "experiments":
        named |= {
            f"{page}/{word}"
            for word in quoted
            if re.fullmatch(r"((data|methods|transfer|pretraining)/)?\w+\.(yaml|py)", word)
        }
    assert len(named) > 4
    assert [word for word in named if "<" not in word and not (REPOSITORY / word).exists()] == []


def test_the_table_of_methods_is_whole() -> None:
    """Every class has a row, every file is in the row of its class, and the paper is the one that the module names."""
    rows = {row[0].strip("`"): row for row in table(README, "method")}
    classes = {cls.__name__: cls for cls in contract.methods()}
    assert rows.keys() == classes.keys()
    files = {name: re.findall(r"\]\((experiments/methods/[^)]+)\)", row[-1]) for name, row in rows.items()}
    existing = sorted((REPOSITORY / "experiments" / "methods").glob("*.yaml"))
    assert sorted(itertools.chain(*files.values())) == [path.relative_to(REPOSITORY).as_posix() for path in existing]
    for name, row in rows.items():
        assert len(row) == 6
        assert all(row), name
        for path in files[name]:
            assert yaml.safe_load((REPOSITORY / path).read_text())["model"]["class_path"] == name
        assert cited(row[1], sys.modules[classes[name].__module__].__doc__), name
        assert name == "SourceOnly" or re.search(r"\d{4}", row[1]), name


def cited(cell: str, documentation: str | None) -> bool:
    """Whether the first authors and years of a table's papers, if it names any, stand in a module's documentation."""
    text = " ".join((documentation or "").split())
    papers = re.findall(r"(\w+)(?: (?:et al\.|& \w+|and \w+))?, \[.*?\]\([^)]*\),? [^;]*?(\d{4})", cell)
    return all(word in text for paper in papers for word in paper)


def test_the_table_of_pretraining_is_whole() -> None:
    """Every class has a row with its files, and the paper is one that the module names."""
    rows = {row[0].strip("`"): row for row in table(README, "pre-training")}
    classes = {cls.__name__: cls for cls in pretraining_contract.methods()}
    assert rows.keys() == classes.keys()
    files = {name: re.findall(r"\]\((experiments/pretraining/[^)]+)\)", row[-1]) for name, row in rows.items()}
    existing = sorted((REPOSITORY / "experiments" / "pretraining").glob("*.yaml"))
    assert sorted(itertools.chain(*files.values())) == [path.relative_to(REPOSITORY).as_posix() for path in existing]
    for name, row in rows.items():
        assert len(row) == 5
        assert all(row), name
        for path in files[name]:
            assert yaml.safe_load((REPOSITORY / path).read_text())["model"]["class_path"] == name
        assert re.search(r"\]\(https://[^)]+\), [^|]*\d{4}", row[1]), name
        assert cited(row[1], sys.modules[classes[name].__module__].__doc__), name


def test_the_table_of_transfer_is_whole() -> None:
    """Every class and policy has a row, every file is in one, and the paper is the one that the module names."""
    rows = {row[0].strip("`"): row for row in table(README, "transfer")}
    classes = {cls.__name__: cls for cls in transfer_contract.methods()}
    policies = {f"policy: {policy}" for policy in get_args(Policy) if policy != "full"}
    (commands_of_fuse,) = (action.choices for action in fuse.build_parser()._actions if action.dest == "command")
    fusions = {f"fuse.py {command}" for command in commands_of_fuse}
    assert rows.keys() == classes.keys() | policies | fusions
    files = {name: re.findall(r"\]\((experiments/transfer/[^)]+)\)", row[-1]) for name, row in rows.items()}
    existing = sorted((REPOSITORY / "experiments" / "transfer").glob("*.yaml"))
    assert sorted(itertools.chain(*files.values())) == [path.relative_to(REPOSITORY).as_posix() for path in existing]
    for name, row in rows.items():
        assert len(row) == 5
        assert all(row), name
        cls = classes.get(name, transfer_contract.TransferClassifier)
        for path in files[name]:
            model = yaml.safe_load((REPOSITORY / path).read_text())["model"]
            assert model["class_path"] == cls.__name__
            if name in policies:
                assert f"policy: {model['init_args']['policy']}" == name
        documented = (framework.fusion,) if name in fusions else (sys.modules[cls.__module__], cls)
        text = " ".join("".join(item.__doc__ or "" for item in documented).split())
        for author, year in re.findall(r"(\w+)(?: et al\.| & \w+), .*?(\d{4})$", row[1]):
            assert author in text, (name, author)
            assert year in text, (name, year)


@pytest.mark.slow
def test_the_table_of_diagnostics_is_whole(domains: Path, tmp_path: Path, images: Callable[..., Path]) -> None:
    """What each method logs in a step, beyond what all do, is described, and no more."""
    general = [name for row in table(README, "scalar") for name in quoted_names(row[0])]
    described = {
        (name, method)
        for row in table(README, "diagnostic")
        for name in quoted_names(row[0])
        for method in quoted_names(row[1])
    }
    found = set()
    optional: dict[str, dict[str, Any]] = {
        "CDAN": {"entropy_conditioning": True},
        "AFN": {"entropy_weight": 0.1},
        "JAN": {"adversarial": True},
    }
    for method in contract.methods():
        logger = CSVLogger(tmp_path / method.__name__)
        model = optional.get(method.__name__, {})
        contract.fit(method, domains, max_epochs=2, log_every_n_steps=1, logger=logger, model=model)  # ADDA: two stages
        names = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
        own = [name for name in names if name.startswith("train/") and not any(matches(g, name) for g in general)]
        if issubclass(method, AlignmentSum):  # those of its terms, with the term's name
            own = [name for name in own if not re.match("train/(cdan|mcc)", name)]
        found |= {(name, method.__name__) for name in own}
    transfer_contract.prepare(tmp_path, images)
    for case in transfer_contract.cases():
        logger = CSVLogger(tmp_path / case.name)
        transfer_contract.fit(case, tmp_path, max_epochs=1, log_every_n_steps=1, logger=logger)
        names = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
        own = [name for name in names if name.startswith("train/") and not any(matches(g, name) for g in general)]
        found |= {(name, case.method.__name__) for name in own}
    pretraining_contract.prepare(tmp_path / "pretraining", images)
    for method in pretraining_contract.methods():
        logger = CSVLogger(tmp_path / method.__name__)
        folders = tmp_path / "pretraining"
        pretraining_contract.fit(method, folders, max_epochs=1, log_every_n_steps=1, logger=logger)
        names = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
        own = [name for name in names if name.startswith("train/") and not any(matches(g, name) for g in general)]
        found |= {(name, method.__name__) for name in own}
    assert sorted(found - described) == []
    assert sorted(described - found) == []


def matches(pattern: str, name: str) -> bool:
    """Whether a name fits one with placeholders, `train/<part>`."""
    return bool(re.fullmatch(re.sub("<[a-z]+>", r"[\\w./]+", pattern), name))


def quoted_names(cell: str) -> list[str]:
    return re.findall(r"`([A-Za-z0-9_/<>]+)`", cell)


def test_the_table_of_residual_networks_is_right() -> None:
    rows = {row[0].strip("`"): row[1:] for row in table(README, "network")}
    assert rows.keys() == RESIDUAL_NETWORKS.keys()
    for name, (size, classes, parameters) in rows.items():
        network = RESIDUAL_NETWORKS[name](int(classes))
        assert f"{sum(p.numel() for p in network.parameters()):,}" == parameters, name
        assert (size == "32 px") == (network.num_features == 64), name


def test_every_data_file_is_in_the_table_of_experiments() -> None:
    text = PAGES["experiments"]
    for path in (REPOSITORY / "experiments" / "data").glob("*.yaml"):
        assert f"`data/{path.name}`" in text, path.name
        options = yaml.safe_load(path.read_text())["data"]["init_args"]
        keys = ("source", "target", "target_test", "root", "folders")
        for named in (options[key] for key in keys if key in options):
            for folder in [named] if isinstance(named, str) else named:
                assert "/".join(folder.split("/")[:2]) in text


@pytest.mark.parametrize("quoted", [row[0] for row in table(README, "message")])
def test_every_message_is_in_the_code(quoted: str) -> None:
    """The fixed parts of each message stand in the sources of the datamodules, in this order."""
    source = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "framework").rglob("*.py"))
    source = re.sub(r'"\s*\n?\s*f?"', "", source)
    message = quoted.strip("`").strip()
    parts = [part.strip() for part in re.split(r"`--data\.\w+`|'[^']*'|\d+", message) if part.strip(" .")]
    assert parts
    for part in parts:
        assert part.strip(" .") in source, part
