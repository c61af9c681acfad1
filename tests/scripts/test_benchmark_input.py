"""The benchmark runs and says what it measured; its figures are those of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark_input
import pytest
from PIL import Image


def test_quick_run(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    paths = {name: tmp_path / name for name in ("json", "markdown")}
    arguments = [f"--{name}={path}" for name, path in paths.items()]
    small = [
        "--repeats",
        "1",
        "--images",
        "8",
        "--files",
        "8",
        "--batch_size",
        "4",
        "--image_size",
        "32",
        "--workers",
        "2",
        "--augment_on_device",
    ]
    assert benchmark_input.main([*small, *arguments]) == 0
    results = json.loads(paths["json"].read_text())
    rows = {
        "ImageFolder, Pillow, v1 transforms",
        "decoded each time, no workers",
        "decoded each time, 2 processes",
        "decoded each time, 2 threads",
        "`--data.cache memory`, no workers",
        "`--data.cache memory`, 2 processes",
        "`--data.cache memory`, 2 threads",
        "`--data.cache memory --data.augment_on device`, no workers",
        "`--data.cache memory --data.augment_on device`, 2 threads",
        "gather + normalise from cache",
        "gather + normalise from cache, as it is usually written",
    }
    assert {kind: set(found) for kind, found in results["kinds"].items()} == {
        "500x375 JPEG": rows,
        "300x300 PNG": rows,
    }
    for found in results["kinds"].values():
        assert found["ImageFolder, Pillow, v1 transforms"]["ratio"] == 1
        assert all(row["images_per_second"] > 0 for row in found.values())
    table = paths["markdown"].read_text()
    assert table.strip() in capsys.readouterr().out
    assert table.count("\n| ") == 2 + len(rows)


def test_images_are_photographs_of_the_size(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    benchmark_input.write_photographs(tmp_path, (50, 37), ".jpg", 6)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 6
    for file in files:
        with Image.open(file) as image:
            assert (image.size, image.format) == ((50, 37), "JPEG")
            assert len(image.getcolors(10_000)) > 500


def test_too_few_images(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        benchmark_input.main(["--images", "8"])
    assert "at least `--batch_size`" in capsys.readouterr().err


def test_summary_compares_within_a_repeat() -> None:
    rates = {benchmark_input.FLOOR: [10.0, 100.0, 20.0], "other": [20.0, 100.0, 60.0]}
    assert benchmark_input.summary(rates)["other"] == {
        "images_per_second": 60.0,
        "ratio": 2.0,
        "least": 1.0,
        "largest": 3.0,
    }
