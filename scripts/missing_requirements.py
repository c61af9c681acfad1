"""Print what pyproject.toml asks for and this Python lacks, one requirement a line; scripts/environment.sh reads it.

    python scripts/missing_requirements.py [--repair] [EXTRA ...]

The project itself is among the requirements: it must be importable from this repository. Nothing is imported and
nothing is asked of the network, so this takes a fraction of a second. ``--repair`` first removes the records of
packages whose installation was cut off: pip would otherwise take them for installed.

Runs on the standard library and what pip brings along, as it must run before anything is installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def read_project() -> dict[str, Any]:
    """The table ``[project]`` of pyproject.toml."""
    try:
        toml = importlib.import_module("tomllib")
    except ImportError:  # Python 3.10
        toml = importlib.import_module("pip._vendor.tomli")
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = toml.load(file)["project"]
    return project


def requirements(project: dict[str, Any], extras: list[str]) -> Iterator[Any]:
    """The project's requirements for this Python, those of its extras included (also of extras named by extras)."""
    try:
        make_requirement = importlib.import_module("packaging.requirements").Requirement
    except ImportError:
        make_requirement = importlib.import_module("pip._vendor.packaging.requirements").Requirement
    lines = list(project["dependencies"])
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        if extra not in project["optional-dependencies"]:
            raise SystemExit(f"missing_requirements.py: pyproject.toml has no extra {extra!r}")
        for line in project["optional-dependencies"][extra]:
            requirement = make_requirement(line)
            if requirement.name == project["name"]:
                waiting.extend(requirement.extras)
            else:
                lines.append(line)
    for requirement in map(make_requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def is_installed(requirement: Any) -> bool:
    """Whether a version that satisfies the requirement is installed."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(version) and requirement.specifier.contains(version, prereleases=True)


def project_is_installed(project: dict[str, Any]) -> bool:
    """Whether the project is installed from this repository, with today's version and commands."""
    try:
        distribution = importlib.metadata.distribution(project["name"])
        specification = importlib.util.find_spec("framework")
    except (importlib.metadata.PackageNotFoundError, ImportError, ValueError):
        return False
    if specification is None or specification.origin is None:
        return False
    commands = {entry.name for entry in distribution.entry_points if entry.group == "console_scripts"}
    return (
        Path(specification.origin).resolve() == REPOSITORY / "framework" / "__init__.py"
        and distribution.version == project["version"]
        and commands >= project["scripts"].keys()
    )


def repair() -> None:
    """Remove the records of packages whose files were not all written.

    pip writes the file INSTALLER after a package's files; a record without it is of an installation that was cut off.
    """
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for record in Path(folder).glob("*.dist-info"):
            if not (record / "INSTALLER").exists():
                shutil.rmtree(record, ignore_errors=True)


def main() -> int:
    """Print the missing requirements; returns 0 if the question could be answered."""
    parser = argparse.ArgumentParser(description="Print the requirements that are not installed, one a line.")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="extras of pyproject.toml")
    parser.add_argument("--repair", action="store_true", help="remove the records of half-installed packages first")
    options = parser.parse_args()
    if options.repair:
        repair()
    project = read_project()
    for requirement in requirements(project, options.extras):
        if not is_installed(requirement):
            print(requirement.name)
    if not project_is_installed(project):
        print(project["name"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
