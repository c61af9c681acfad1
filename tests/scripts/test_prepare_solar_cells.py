"""scripts/prepare_solar_cells.py: the package's images, split by the seed, with the experts' labels."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import elpv_dataset
import prepare_solar_cells
import pytest

PACKAGE = Path(next(iter(elpv_dataset.__path__))) / "data"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cells")
    assert prepare_solar_cells.main(["--output", str(output)]) == 0
    return output


def labels() -> dict[str, tuple[str, float]]:
    """Kind and probability of each cell, read here by other means than in the script."""
    found = {}
    for row in (PACKAGE / "labels.csv").read_text().split("\n"):
        if row:
            found[Path(row.split()[0]).stem] = (row.split()[2], float(row.split()[1]))
    return found


def written(folder: Path) -> dict[str, tuple[str, str, str]]:
    return {path.stem: path.parts[-4:-1] for path in folder.glob("*/*/*/*.png")}  # type: ignore[misc]


def test_every_sure_cell_is_written_once_under_its_label(cells: Path) -> None:
    expected = {
        name: (kind, "defective" if probability == 1 else "functional")
        for name, (kind, probability) in labels().items()
        if probability in (0, 1)
    }
    assert {name: (kind, label) for name, (kind, _, label) in written(cells).items()} == expected
    assert len(list(cells.glob("*/*/*/*.png"))) == len(expected) == 2223


def test_counts_are_those_of_the_table(cells: Path) -> None:
    found = Counter(written(cells).values())
    words = (prepare_solar_cells.__doc__ or "").replace(",", "").replace(":", "").split()
    for kind, train, test in (("mono", (441, 235), (147, 78)), ("poly", (690, 302), (230, 100))):
        for part, (functional, defective) in (("train", train), ("test", test)):
            assert found[kind, part, "functional"] == functional
            assert found[kind, part, "defective"] == defective
            assert {str(functional), str(defective), str(functional + defective)} <= set(words)


def test_the_images_are_the_packages_bytes(cells: Path) -> None:
    for path in list(cells.glob("*/*/*/*.png"))[::40]:
        assert path.read_bytes() == (PACKAGE / "images" / path.name).read_bytes()


def test_the_seed_decides_the_split(cells: Path, tmp_path: Path) -> None:
    for name, seed in (("same", "0"), ("other", "1")):
        arguments = ["--output", str(tmp_path / name), "--domains", "poly", "--seed", seed]
        assert prepare_solar_cells.main(arguments) == 0
    first = {name: place for name, place in written(cells).items() if place[0] == "poly"}
    assert written(tmp_path / "same") == first
    assert written(tmp_path / "other").keys() == first.keys()
    assert written(tmp_path / "other") != first


@pytest.mark.slow
def test_uncertain_cells_are_added_by_the_nearer_label(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_solar_cells.main(["--output", str(tmp_path), "--uncertain", "include"]) == 0
    found = written(tmp_path)
    assert found.keys() == labels().keys()
    assert all((label == "defective") == (labels()[name][1] > 0.5) for name, (_, _, label) in found.items())
    # not mixed with what is there without them
    assert prepare_solar_cells.main(["--output", str(cells), "--uncertain", "include"]) == 1
    assert "'uncertain': 'omit'" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    assert prepare_solar_cells.main(["--output", str(tmp_path)]) == 1
    assert 'pip install "transfer-framework[solar]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
