"""What the command line imports before there is anything to train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "lightning", "torchvision", "torchmetrics", "numpy", "jsonargparse", "yaml"}
EXTRAS = {"timm", "sklearn", "peft", "mlxtend", "ot", "safetensors", "pandas", "onnx", "elpv_dataset"}
METHODS = Path(__file__).parents[1] / "experiments"

SCRIPT = """
import sys
from framework.__main__ import main
code = 0
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print("modules", *{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
sys.exit(code)
"""


def imported(*arguments: str) -> set[str]:
    run = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("modules ")]
    return set(line.split()[1:])


def test_help_is_there_at_once() -> None:
    for arguments in (["--help"], ["--version"]):
        found = imported(*arguments)
        assert "framework" in found
        assert not found & (HEAVY | EXTRAS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--help"],
        ["fit", "--model.help", "DANN"],
        [
            *("fit", "--config", str(METHODS / "methods" / "dann.yaml")),
            *("--config", str(METHODS / "data" / "mnist_to_mnist_m.yaml"), "--print_config"),
        ],
    ],
    ids=["fit", "model", "print_config"],
)
def test_helps_import_no_extra(arguments: list[str]) -> None:
    """torch, Lightning and what these import are needed to know the options; networks and data sets are not."""
    found = imported(*arguments)
    assert found >= HEAVY - {"numpy"}
    assert not found & (EXTRAS - installed_with_torchmetrics())


def installed_with_torchmetrics() -> set[str]:
    """What torchmetrics imports by itself where it is there."""
    script = "import sys, torchmetrics; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())
