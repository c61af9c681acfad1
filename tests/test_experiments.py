"""Every file of experiments/, on small folders laid out as the file says. A new YAML is tested by existing."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from pretraining_contract import SMALL as SMALL_TASKS

from framework.__main__ import main
from framework.datamodules import ImageFolderDataModule
from framework.modules import DomainAdaptation, PretrainingModule, ResidualClassifier, TransferClassifier
from framework.networks.backbones import create_backbone, list_backbones
from framework.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENTS = REPOSITORY / "experiments"
METHODS = sorted((EXPERIMENTS / "methods").glob("*.yaml"))
TRANSFER = sorted((EXPERIMENTS / "transfer").glob("*.yaml"))
PRETRAINING = sorted((EXPERIMENTS / "pretraining").glob("*.yaml"))  # model and, but for the folders, data
DATA = sorted((EXPERIMENTS / "data").glob("*.yaml"))
WHOLE = sorted(EXPERIMENTS.glob("*.yaml"))  # model and data in one file
FOLDERS = ("source", "target", "target_test", "source_val", "target_val", "folders")


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def listed(folders: str | list[str]) -> list[str]:
    """One folder or several, as a list."""
    return [folders] if isinstance(folders, str) else folders


def serves(path: Path) -> str:
    return str(read(path)["data"]["class_path"])


PAIRS = [path for path in DATA if serves(path) == "DomainPairDataModule"]
SINGLE = [path for path in DATA if serves(path) == "ImageFolderDataModule"]
UNLABELLED = [path for path in DATA if serves(path) == "UnlabelledFolderDataModule"]
COMPOSITIONS = [
    # each method with one pair in turn, and each pair with one method: the two kinds of file know nothing of each other
    *dict.fromkeys([*zip(METHODS, itertools.cycle(PAIRS)), *zip(itertools.cycle(METHODS), PAIRS)]),
    *dict.fromkeys([*zip(TRANSFER, itertools.cycle(SINGLE)), *zip(itertools.cycle(TRANSFER), SINGLE)]),
    *dict.fromkeys([*zip(PRETRAINING, itertools.cycle(UNLABELLED)), *zip(itertools.cycle(PRETRAINING), UNLABELLED)]),
    *itertools.product(WHOLE, SINGLE),
]
SMALL = shlex.split(
    "--data.image_size 16 --data.resize_size 20 --data.batch_size 4 --data.num_workers 0 --model.backbone resnet8 "
    "--model.weights none --trainer.accelerator cpu --trainer.enable_progress_bar false"
)


def needs(path: Path) -> list[str]:
    """Flags that give a file of experiments/transfer or pretraining what it needs to run on the small folders."""
    if path in PRETRAINING:
        known = read(path)["model"]["init_args"]
        return [w for key, value in SMALL_TASKS.items() if key in known for w in (f"--model.{key}", str(value))]
    if path not in TRANSFER:
        return []
    if path.stem == "lora":
        options = ["--model.backbone_options", "{img_size: 16, patch_size: 8, embed_dim: 24, depth: 2}"]
        return ["--model.backbone", "timm/vit_tiny_patch16_224", *options]
    teachers = ["--model.teachers", "[teacher.ckpt]"] if path.stem == "distillation" else []
    return ["--model.weights", "weights.pth", *teachers]


def name(path: Path | tuple[Path, ...]) -> str:
    return path.stem if isinstance(path, Path) else "-".join(p.stem for p in path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, images: Callable[..., Path]) -> Path:
    """A working directory with the folders that the files name, at the relative paths that they name."""
    root = tmp_path_factory.mktemp("folders")
    for path in DATA:
        options = read(path)["data"]["init_args"]
        named = [folder for key in FOLDERS if key in options for folder in listed(options[key])]
        named += [f"{options['root']}/{part}" for part in ("train", "test") if "root" in options]
        for number, folder in enumerate(dict.fromkeys(named)):
            images(root / folder, ["bird", "dog"], count=7, seed=number)
    images(root / "photos", ["bird", "dog"], count=9)
    source = create_backbone("resnet8").state_dict()
    source |= {"fc.weight": torch.randn(5, 64), "fc.bias": torch.randn(5)}
    torch.save(source, root / "weights.pth")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1
    )
    data = ImageFolderDataModule(str(root / "photos"), batch_size=4, image_size=16, num_workers=0)
    trainer.fit(ResidualClassifier(2, backbone="resnet8"), data)
    trainer.save_checkpoint(root / "teacher.ckpt")
    return root


@pytest.fixture
def here(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, as the working directory."""
    monkeypatch.chdir(folders)
    return folders


def resolved(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration that a command line would run."""
    capsys.readouterr()
    assert main([*arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)  # type: ignore[no-any-return]


def configs(*paths: Path) -> list[str]:
    return ["fit", *(word for path in paths for word in ("--config", str(path)))]


def assert_holds(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {key: options.get(key) for key in expected} == expected


# ---------------------------------------------------------------------- what the files hold
def test_every_yaml_is_of_a_kind_that_is_tested() -> None:
    kinds = [METHODS, TRANSFER, PRETRAINING, PAIRS, SINGLE, UNLABELLED, WHOLE]
    assert all(kinds)
    assert set(itertools.chain(*kinds)) == set(EXPERIMENTS.rglob("*.yaml"))
    for path in (*METHODS, *TRANSFER):
        assert list(read(path)) == ["model"], path
    for path in DATA:
        content = read(path)
        assert content.keys() <= {"model", "data", "trainer"}, path
        assert content.get("model", {}).keys() <= {"init_args"}, f"{path} names a class: it would replace the method's"
    for path in WHOLE:
        assert {"model", "data"} <= read(path).keys(), path
    for path in PRETRAINING:
        assert {"model", "data"} <= read(path).keys() <= {"model", "data", "trainer"}, path
        assert serves(path) == "UnlabelledFolderDataModule", path
        assert "folders" not in read(path)["data"]["init_args"], path


def test_every_method_has_a_file_and_every_file_a_method() -> None:
    def subclasses(base: type) -> set[str]:
        found = {cls.__name__ for cls in base.__subclasses__() if cls.__module__.startswith("framework.")}
        return found.union(*(subclasses(cls) for cls in base.__subclasses__()))

    # some have several files: the same loss with and without an option that has a name of its own
    assert {read(path)["model"]["class_path"] for path in METHODS} == subclasses(DomainAdaptation)
    bases = {"RegularizedTransfer", "SourceTaskTransfer"}
    learned = {"TransferClassifier", *subclasses(TransferClassifier)} - bases
    assert {read(path)["model"]["class_path"] for path in TRANSFER} == learned
    assert {read(path)["model"]["class_path"] for path in PRETRAINING} == subclasses(PretrainingModule)


@pytest.mark.parametrize("path", [*METHODS, *TRANSFER, *PRETRAINING, *DATA, *WHOLE], ids=name)
def test_every_number_is_one(path: Path) -> None:
    """``1e-3`` is a text to YAML 1.1, which a script that reads these files would get."""

    def check(value: Any) -> None:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                check(item)
        elif isinstance(value, str):
            assert not value.replace("e", "").replace("-", "").replace(".", "").isdigit(), value

    check(read(path))


@pytest.mark.parametrize("path", [*METHODS, *TRANSFER, *PRETRAINING, *DATA, *WHOLE], ids=name)
def test_its_backbone_and_weights_exist(path: Path) -> None:
    options = read(path).get("model", {}).get("init_args", {})
    if "backbone" in options:
        assert (
            options["backbone"] in list_backbones() or options["backbone"].removeprefix("timm/") in timm.list_models()
        )
        if str(options.get("weights")).startswith("data/"):
            create_backbone(options["backbone"])  # for the file, see below
        elif options.get("weights"):
            assert options["weights"] in torchvision.models.get_model_weights(options["backbone"]).__members__
        else:
            create_backbone(options["backbone"], **options.get("backbone_options", {}))


@pytest.mark.parametrize("script", ["prepare_digits", "prepare_solar_cells"])
def test_the_images_are_where_the_script_writes_them(script: str) -> None:
    module = load(REPOSITORY / "scripts" / f"{script}.py")
    output = module.build_parser().get_default("output")
    known = {str(output / domain) for domain in module.build_parser().get_default("domains")}
    known |= {f"{folder}/{part}" for folder in known for part in ("train", "test")}
    used_somewhere = False
    for path in DATA:
        options = read(path)["data"]["init_args"]
        used = {folder for key, value in options.items() if key in (*FOLDERS, "root") for folder in listed(value)}
        written = {folder for folder in used if folder.startswith(f"{output}/")}
        assert written <= known, path
        assert not written or written == used
        used_somewhere |= bool(written)
    assert used_somewhere


def test_the_weights_are_where_the_script_writes_them() -> None:
    script = load(REPOSITORY / "scripts" / "prepare_lite0_weights.py")
    output = str(script.build_parser().get_default("output") / script.FILE)
    named = {str(read(path).get("model", {}).get("init_args", {}).get("weights")) for path in DATA}
    assert {weights for weights in named if "/" in weights} == {output}


# ---------------------------------------------------------------------- what they compose to
@pytest.mark.parametrize("files", COMPOSITIONS, ids=name)
def test_constants_of_both_files_arrive(
    files: tuple[Path, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = map(read, files)
    configuration = resolved(configs(*files), capsys)
    model, data = configuration["model"], configuration["data"]
    assert model["class_path"].rsplit(".", 1)[-1] == first["model"]["class_path"]
    assert_holds(model["init_args"], first["model"]["init_args"] | second.get("model", {}).get("init_args", {}))
    assert data["class_path"].rsplit(".", 1)[-1] == second["data"]["class_path"]
    assert_holds(data["init_args"], first.get("data", {}).get("init_args", {}) | second["data"]["init_args"])
    assert_holds(configuration["trainer"], first.get("trainer", {}) | second.get("trainer", {}))


def test_flags_win_over_both_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--model.learning_rate 0.5 --model.optimizer_options.momentum 0.125 --data.batch_size 3 --trainer.max_epochs 2"
    )
    for files in zip(METHODS, itertools.cycle(PAIRS)):
        configuration = resolved([*configs(*files), *flags.split()], capsys)
        assert configuration["model"]["init_args"]["learning_rate"] == 0.5
        others = read(files[0])["model"]["init_args"]["optimizer_options"]
        assert configuration["model"]["init_args"]["optimizer_options"] == others | {"momentum": 0.125}
        assert configuration["data"]["init_args"]["batch_size"] == 3
        assert configuration["trainer"]["max_epochs"] == 2


# ---------------------------------------------------------------------- that they run
@pytest.mark.slow
@pytest.mark.parametrize("files", COMPOSITIONS, ids=name)
def test_every_composition_runs(files: tuple[Path, Path], here: Path) -> None:
    before = set(here.rglob("*"))
    assert main([*configs(*files), *SMALL, *needs(files[0]), "--trainer.fast_dev_run", "true"]) == 0
    assert set(here.rglob("*")) == before


@pytest.mark.parametrize("path", WHOLE, ids=name)
def test_a_whole_file_runs_on_any_folder(path: Path, here: Path) -> None:
    policies = ["full", "frozen"] if "policy" in read(path)["model"]["init_args"] else [None]
    for policy in policies:
        flags = ["--data.root", "photos", *(["--model.policy", policy] if policy else [])]
        assert main([*configs(path), *flags, *SMALL, "--trainer.fast_dev_run", "true"]) == 0


@pytest.mark.parametrize("path", PRETRAINING, ids=name)
@pytest.mark.parametrize("given", ["photos", "[photos, photos/bird]"], ids=["one folder", "two folders"])
def test_pretraining_runs_on_any_folders(path: Path, given: str, here: Path) -> None:
    flags = ["--data.folders", given, *SMALL, *needs(path), "--trainer.fast_dev_run", "true"]
    assert main([*configs(path), *flags]) == 0


@pytest.mark.parametrize(
    ("path", "flag"),
    [*((path, "`--data.root`") for path in WHOLE), *((path, "`--data.folders`") for path in PRETRAINING)],
    ids=lambda value: name(value) if isinstance(value, Path) else "",
)
def test_a_whole_file_asks_for_the_folder(
    path: Path, flag: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(configs(path)) == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("path", PAIRS, ids=name)
def test_every_pair_is_tested_on_the_target(path: Path, here: Path) -> None:
    """A run of one step and its test, so that the path of ``target_test`` counts too."""
    run = f"lightning_logs/{path.stem}/version_0"
    flags = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.experiment", path.stem]
    flags += ["--trainer.log_every_n_steps", "1"]
    assert main([*configs(METHODS[0], path), *SMALL, *flags]) == 0
    assert main(["test", "--run", run, "--trainer.enable_progress_bar", "false"]) == 0
    text = (here / run / "metrics.csv").read_text()
    assert "test/accuracy" in text
    assert "test/mean_class_accuracy" in text


# ---------------------------------------------------------------------- scripts
@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.py")), ids=name)
def test_every_script_can_be_imported_and_has_a_main(path: Path, here: Path) -> None:
    assert callable(load(path).main)
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def load(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Callable[..., Path]) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart = load(EXPERIMENTS / "quickstart.py")
    default = inspect.signature(quickstart.main).parameters["digits"].default
    target = next(path for path in PAIRS if path.stem == "mnist_to_optdigits")
    options = read(target)["data"]["init_args"]
    for key, count in (("source", 36), ("target", 36), ("target_test", 3)):
        assert options[key].startswith(f"{default}/")
        images(tmp_path / options[key], ["0", "1"], count=count, size=28)
    accuracy = quickstart.main(max_epochs=1, steps_per_epoch=1)
    assert 0 <= accuracy <= 1
    assert (tmp_path / "lightning_logs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt").exists()


def test_quickstart_says_what_the_data_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and the shell give the same run but for its length."""
    given: dict[str, Any] = {}

    class RecordedError(Exception):
        pass

    def record(**options: Any) -> None:
        given.update(options)
        raise RecordedError

    quickstart = load(EXPERIMENTS / "quickstart.py")
    monkeypatch.setattr(quickstart, "DomainPairDataModule", record)
    with pytest.raises(RecordedError):
        quickstart.main()
    target = next(path for path in PAIRS if read(path)["data"]["init_args"]["target"] == given["target"])
    expected = read(target)["data"]["init_args"]
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    assert listed == {key: expected[key] for key in given}
