"""The shell scripts: they parse, and a machine that lacks something is told so in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.sh"))
BASH = shutil.which("bash") or ""
pytestmark = pytest.mark.skipif(not BASH, reason="needs bash")
# What decides about the environment, or about where pip looks, must not come from whoever runs the tests.
UNSET = (
    "TRANSFER_FRAMEWORK_VENV",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "CONDA_DEFAULT_ENV",
    "PYTHON",
    "PYTHONPATH",
    "PIP_FIND_LINKS",
)
FAKE_PIP = '''
"""Stands in for pip: notes its arguments; installs by writing the records that a real installation leaves."""
import json, os, pathlib, re, sys, sysconfig
folder = pathlib.Path(sysconfig.get_path("purelib"))
if sys.argv[1:2] != ["install"]:
    sys.exit(0)
with open(os.environ["FAKE_PIP_CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("FAKE_PIP_FAILS"):
    print("Looking in indexes: https://index.invalid/simple")
    print("ERROR: Pool(host='index.invalid', port=443): https://index.invalid/x refused", file=sys.stderr)
    sys.exit(1)
repository = re.sub(r"\\[[a-z,]*\\]$", "", sys.argv[-1])
text = pathlib.Path(repository, "pyproject.toml").read_text()
names = set(re.findall(r'"([A-Za-z][A-Za-z0-9-]*)>=', text)) - {"ruff", "mypy"}  # what is required, but for dev
versions = {**{name: "9999.0" for name in names}, "jsonargparse": "4.99", "transfer-framework": "0.1.0"}
versions["transfer-framework"] = re.search('^version = "(.*)"', text, re.M).group(1)
for name, version in versions.items():
    record = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    (record / "INSTALLER").write_text("pip")
(record / "entry_points.txt").write_text("[console_scripts]\\nframework = framework.__main__:main\\n")
(folder / "transfer_framework.pth").write_text(repository + "\\n")
'''


def run(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    return subprocess.run(
        [BASH, *arguments],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr that a failure must end in."""
    assert result.returncode == 1, result
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's scripts in a folder with a space in its name, so that no test can harm the real .venv."""
    folder = tmp_path / "a copy"
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    (folder / "framework").mkdir()
    (folder / "framework" / "__init__.py").touch()
    (folder / "use.sh").write_text(
        'set -euo pipefail; source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/environment.sh" "$@"; '
        'echo "python: $(command -v python)"; echo "repository: $repository"\n'
    )
    return folder


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for PATH that holds what the scripts use, and no python."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in ("bash", "dirname", "grep", "ls", "mkdir", "rm", "sed", "sleep", "tail"):
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return folder


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """A virtual environment whose pip only pretends; as variables for ``run``."""
    pip = pytest.importorskip("pip")
    environment = tmp_path / "an environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").touch()
    (packages / "pip" / "__main__.py").write_text(FAKE_PIP)
    (packages / "pip" / "_vendor").symlink_to(Path(pip.__file__).parent / "_vendor")
    return {"TRANSFER_FRAMEWORK_VENV": str(environment), "FAKE_PIP_CALLS": str(tmp_path / "calls")}


def packages_of(fake: dict[str, str]) -> Path:
    return next(Path(fake["TRANSFER_FRAMEWORK_VENV"]).glob("lib/python*/site-packages"))


def calls_of(fake: dict[str, str]) -> list[str]:
    path = Path(fake["FAKE_PIP_CALLS"])
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("script", [*SCRIPTS, REPOSITORY / ".ci" / "run"], ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    result = run(["-n", str(script)])
    assert (result.returncode, result.stderr) == (0, "")


def test_all_scripts_are_here() -> None:
    assert {"check.sh", "demo.sh", "environment.sh", "test.sh"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "check.sh"])
def test_no_python(copy: Path, commands: Path, script: str) -> None:
    message = one_line(run([str(copy / "scripts" / script)], PATH=str(commands)))
    assert "python3 (3.10 or newer)" in message
    assert not (copy / ".venv").exists()


def test_python_variable_names_nothing(copy: Path) -> None:
    message = one_line(run([str(copy / "use.sh"), "test"], PYTHON="/nowhere/python3"))
    assert "PYTHON" in message
    assert "/nowhere/python3" in message


def test_python_too_old(copy: Path, commands: Path) -> None:
    (commands / "python3").write_text(f'#!{BASH}\n[ "$1" != -c ] || exit 1\n')
    (commands / "python3").chmod(0o755)
    assert "3.10 or newer, but python3 is older" in one_line(run([str(copy / "use.sh")], PATH=str(commands)))


def test_python_without_venv(copy: Path, commands: Path) -> None:
    (commands / "python3").write_text(f'#!{BASH}\ncase "$*" in *ensurepip*) exit 1 ;; esac\n')
    (commands / "python3").chmod(0o755)
    assert "apt install python3-venv" in one_line(run([str(copy / "use.sh")], PATH=str(commands)))


@pytest.mark.slow
def test_no_network(copy: Path, tmp_path: Path) -> None:
    """With the real pip: a new environment is made, and the failing installation says what to look at."""
    environment = tmp_path / "new environment"
    result = run(
        [str(copy / "scripts" / "test.sh")],
        TRANSFER_FRAMEWORK_VENV=str(environment),
        PYTHON=sys.executable,
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
    )
    message = one_line(result)
    assert "network" in message
    log = environment / "transfer-framework-install.log"
    assert str(log) in message
    assert "No matching distribution" in log.read_text()
    assert f"Making the virtual environment {environment}" in result.stdout
    assert "Installing torch, torchvision, lightning" in result.stdout
    assert "about 6 GB" in result.stdout


def test_installs_once(copy: Path, fake: dict[str, str]) -> None:
    result = run([str(copy / "use.sh"), "digits", "test"], **fake)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Installing torch, torchvision" in result.stdout
    assert f"python: {fake['TRANSFER_FRAMEWORK_VENV']}/bin/python\n" in result.stdout
    assert f"repository: {copy}\n" in result.stdout
    assert len(calls_of(fake)) == 1
    assert f'"{copy}[digits,test]"' in calls_of(fake)[0]
    # Nothing is missing now, for fewer extras as well.
    for extras in (["digits", "test"], ["digits"]):
        result = run([str(copy / "use.sh"), *extras], **fake)
        assert (result.returncode, result.stderr) == (0, "")
        assert "Installing" not in result.stdout
    assert len(calls_of(fake)) == 1
    # More extras, or a requirement in another version, is noticed.
    result = run([str(copy / "use.sh"), "dev"], **fake)
    assert "Installing ruff, mypy" in result.stdout.replace("mypy, ruff", "ruff, mypy")
    (copy / "pyproject.toml").write_text((copy / "pyproject.toml").read_text().replace('"torch>=', '"torch>=99999'))
    result = run([str(copy / "use.sh"), "digits"], **fake)
    assert "Installing torch (about 6 GB" in result.stdout
    assert len(calls_of(fake)) == 3


def test_active_environment_is_used(copy: Path, fake: dict[str, str]) -> None:
    active = fake.pop("TRANSFER_FRAMEWORK_VENV")
    result = run([str(copy / "use.sh"), "digits"], VIRTUAL_ENV=active, **fake)
    assert f"Using the virtual environment {active} (the active one)" in result.stdout
    assert not (copy / ".venv").exists()


def test_another_repositorys_installation_is_replaced(copy: Path, fake: dict[str, str], tmp_path: Path) -> None:
    assert run([str(copy / "use.sh"), "digits"], **fake).returncode == 0
    moved = copy.rename(tmp_path / "moved")
    result = run([str(moved / "use.sh"), "digits"], **fake)
    assert "Installing transfer-framework\n" in result.stdout
    assert "--no-deps" in calls_of(fake)[1]  # the repository only, for which no network is needed


def test_failed_installation_shows_no_address_and_can_be_repeated(copy: Path, fake: dict[str, str]) -> None:
    result = run([str(copy / "use.sh"), "digits"], FAKE_PIP_FAILS="1", **fake)
    assert "network" in one_line(result)
    assert "  pip: ERROR: " in result.stdout
    assert "index.invalid" not in result.stdout + result.stderr
    result = run([str(copy / "use.sh"), "digits"], **fake)
    assert (result.returncode, result.stderr) == (0, "")


def test_cut_off_installation_is_finished(copy: Path, fake: dict[str, str]) -> None:
    assert run([str(copy / "use.sh"), "digits"], **fake).returncode == 0
    # As SIGKILL leaves it: our note that an installation runs, and a package without pip's last file.
    (Path(fake["TRANSFER_FRAMEWORK_VENV"]) / ".transfer-framework.installing").touch()
    record = packages_of(fake) / "torch-9999.0.dist-info"
    (record / "INSTALLER").unlink()
    result = run([str(copy / "use.sh"), "digits"], **fake)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Installing torch (about 6 GB" in result.stdout
    assert (record / "INSTALLER").exists()
    assert "Installing" not in run([str(copy / "use.sh"), "digits"], **fake).stdout


def test_foreign_folder_is_not_made_an_environment(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    message = one_line(run([str(copy / "use.sh")], TRANSFER_FRAMEWORK_VENV=str(tmp_path / "photos")))
    assert "TRANSFER_FRAMEWORK_VENV" in message
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["one.jpg"]


def test_arguments_reach_pytest(copy: Path, fake: dict[str, str]) -> None:
    """scripts/test.sh leaves slow tests out, --all does not, and the rest is pytest's; its status is passed on."""
    (packages_of(fake) / "pytest.py").write_text("import sys; print(sys.argv[1:]); sys.exit(5)\n")
    processes = ["-n", "auto", "--maxprocesses", "8"]
    for arguments, more in (
        (["-k", "a b"], ["-m", "not slow", "-k", "a b"]),
        (["--all", "-x"], ["-x"]),
        (["--all"], []),
    ):
        expected = [*processes, *more]
        result = run([str(copy / "scripts" / "test.sh"), *arguments], **fake)
        assert result.returncode == 5
        assert f"\n{expected}\n" in result.stdout
        assert "The tests took" in result.stdout
