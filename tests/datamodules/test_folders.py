"""Folders of images: what is found, what is read, and what is said about mistakes."""

from __future__ import annotations

import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from framework.datamodules import decoding
from framework.datamodules.decoding import check_images, read_image
from framework.datamodules.folders import (
    class_names,
    labelled_images,
    stratified_split,
    unlabelled_images,
)
from framework.errors import ConfigurationError

Writer = Callable[..., Path]


def fails(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigurationError) as raised:
        call()
    return str(raised.value)


# ---------------------------------------------------------------------- what is found
def test_labelled_images_are_those_of_torchvision(tmp_path: Path, images: Writer) -> None:
    images(tmp_path, ["b", "a", "C"], count=3)
    images(tmp_path / "a" / "deeper", count=2)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "UPPER.PNG").write_bytes((tmp_path / "a" / "0.png").read_bytes())
    found = labelled_images(tmp_path, "--data.source")
    expected = ImageFolder(str(tmp_path))
    assert found.classes == expected.classes == ["C", "a", "b"]
    assert sorted(zip(found.paths, found.labels, strict=True)) == sorted(expected.samples)
    assert len(found) == 12


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path, images: Writer) -> None:
    images(tmp_path, ["a", "b"], count=2)
    images(tmp_path / ".cache", ["x"], count=1)
    images(tmp_path / "a" / ".thumbnails", count=1)
    (tmp_path / "a" / "._0.png").write_bytes(b"of a file manager")
    (tmp_path / "readme.md").write_text("beside the classes")
    assert labelled_images(tmp_path, "--data.source").classes == ["a", "b"]
    assert len(labelled_images(tmp_path, "--data.source")) == 4
    assert len(unlabelled_images(tmp_path, "--data.target")) == 4


def test_the_target_may_be_flat_nested_or_in_classes(tmp_path: Path, images: Writer) -> None:
    images(tmp_path, count=2)
    images(tmp_path / "class", count=2)
    images(tmp_path / "class" / "deep" / "deeper", count=2)
    found = unlabelled_images(tmp_path, "--data.target")
    assert len(found) == 6
    assert len(set(found.paths)) == 6
    assert found.labels == []
    assert found.classes == []
    assert found.paths == unlabelled_images(tmp_path, "--data.target").paths


def test_links_to_folders_are_followed(tmp_path: Path, images: Writer) -> None:
    images(tmp_path / "elsewhere", count=3)
    images(tmp_path / "root", ["a"], count=2)
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    assert labelled_images(tmp_path / "root", "--data.source").labels == [0, 0, 1, 1, 1]
    (tmp_path / "root" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    assert labelled_images(tmp_path / "root", "--data.source").labels == [0, 0, 0, 0, 0, 1, 1, 1]


def test_home_is_understood(tmp_path: Path, images: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path / "data", ["a", "b"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert class_names("~/data", "--data.source") == ["a", "b"]
    assert len(unlabelled_images("~/data", "--data.target")) == 12


def test_subset_and_forgetting_labels(tmp_path: Path, images: Writer) -> None:
    files = labelled_images(images(tmp_path, ["a", "b"], count=2), "--data.source")
    part = files.subset([3, 0])
    assert part.paths == [files.paths[3], files.paths[0]]
    assert part.labels == [1, 0]
    forgotten = files.without_labels()
    assert (forgotten.labels, forgotten.classes, forgotten.subset([1]).labels) == ([], [], [])


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("read", [class_names, labelled_images, unlabelled_images])
def test_missing_folder(tmp_path: Path, read: Callable[..., object]) -> None:
    message = fails(lambda: read(tmp_path / "none", "--data.source"))
    assert message == f"Expected `--data.source` to be a folder of images, but '{tmp_path}/none' does not exist."


@pytest.mark.parametrize("read", [class_names, labelled_images, unlabelled_images])
def test_a_file_is_no_folder(tmp_path: Path, read: Callable[..., object]) -> None:
    (tmp_path / "file").write_text("")
    assert "`--data.target` to be a folder of images, but" in fails(lambda: read(tmp_path / "file", "--data.target"))
    assert fails(lambda: read(tmp_path / "file", "--data.target")).endswith("/file' is a file.")


def test_a_name_that_the_system_refuses() -> None:
    assert "`--data.source` to be a folder that can be read" in fails(lambda: class_names("x" * 5000, "--data.source"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_closed_folder_as_user(tmp_path: Path, images: Writer) -> None:
    images(tmp_path, ["a", "b"])
    (tmp_path / "a").chmod(0)
    try:
        assert "Permission denied" in fails(lambda: labelled_images(tmp_path, "--data.source"))
    finally:
        (tmp_path / "a").chmod(0o700)


def test_closed_folder(tmp_path: Path, images: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, ["a", "b"])
    scandir = os.scandir

    def refuse(path: str | Path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = f"Expected `--data.x` to be a folder that can be read, but '{tmp_path}/a' cannot: Permission denied."
    assert fails(lambda: labelled_images(tmp_path, "--data.x")) == message
    assert fails(lambda: unlabelled_images(tmp_path, "--data.x")) == message
    assert fails(lambda: class_names(tmp_path / "a", "--data.x")) == message


@pytest.mark.parametrize("folders", [[], ["only"]])
def test_fewer_than_two_classes(tmp_path: Path, images: Writer, folders: list[str]) -> None:
    images(tmp_path, folders or None)
    message = fails(lambda: class_names(tmp_path, "--data.source"))
    assert f"a folder for each of at least two classes, but found {len(folders)} under '{tmp_path}'" in message


def test_empty_classes_are_named(tmp_path: Path, images: Writer) -> None:
    images(tmp_path, ["a", "b"])
    for name in ("empty", "texts"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    message = fails(lambda: labelled_images(tmp_path, "--data.source"))
    assert (
        "Expected every class folder of `--data.source` to hold images, but found none in 'empty', 'texts'" in message
    )


def test_no_images_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    message = f"`--data.source` to hold images, but found none under '{tmp_path}' (looked for .jpg, "
    assert message in fails(lambda: labelled_images(tmp_path, "--data.source"))
    assert message in fails(lambda: unlabelled_images(tmp_path, "--data.source"))


def test_differing_classes_are_listed(tmp_path: Path, images: Writer) -> None:
    images(tmp_path, ["ant", "Bee", "dog"])
    message = fails(lambda: labelled_images(tmp_path, "--data.target_test", ["ant", "bee", "cat", "dog"]))
    assert "`--data.target_test` to hold the 4 classes of the training images" in message
    assert "missing: 'bee', 'cat'; and not among those of training: 'Bee'." in message


def test_long_lists_are_cut(tmp_path: Path, images: Writer) -> None:
    images(tmp_path, ["x", "y"])
    message = fails(lambda: labelled_images(tmp_path, "--data.target_test", [f"c{i:02}" for i in range(13)]))
    assert "'c09' and 3 more; and not among" in message


# ---------------------------------------------------------------------- pixels
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tiff"])
def test_rgb_pixels(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    path = tmp_path / f"image{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    read = read_image(str(path))
    assert read.dtype == torch.uint8
    assert read.shape == (3, 5, 7)
    if suffix != ".jpg":
        assert torch.equal(read, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", ".png"), ("L", ".png"), ("LA", ".png"), ("P", ".png"), ("RGBA", ".png"), ("CMYK", ".jpg")],
)
def test_other_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(str(path)), expected)
    check_images([str(path)], "--data.source")


@pytest.mark.parametrize(
    ("kind", "suffix", "mode"), [("<u2", ".png", "I;16"), (">u2", ".tiff", "I;16B"), ("<i4", ".pgm", "I")]
)
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, kind: str, suffix: str, mode: str) -> None:
    values = np.array([[0, 128, 129, 255, 257, 300, 5140, 32768, 65278, 65407, 65535]])
    path = tmp_path / f"image{suffix}"
    Image.fromarray(values.astype(kind)).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    read = read_image(str(path))
    assert read[0].tolist() == [[round(int(v) * 255 / 65535) for v in values[0]]]
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[0], read[2])
    check_images([str(path)], "--data.source")


def by_pillow(path: Path) -> torch.Tensor:
    """The pixels as Pillow has them, 16 bits scaled."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            wide = np.round(np.asarray(image).astype(np.float64) * 255 / 65535).astype(np.uint8)
            return torch.from_numpy(wide).expand(3, -1, -1)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def photograph(height: int = 61, width: int = 83) -> Image.Image:
    """Smooth colours with some noise and an edge: what JPEG is made for."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(y / 9), np.cos(x / 7), np.sin((x + y) / 11)], axis=-1) * 90 + 128
    waves[:, width // 2 :] *= 0.6
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


JPEGS: dict[str, dict[str, object]] = {
    "best": {"quality": 100, "subsampling": 0},
    "4:2:2": {"quality": 80, "subsampling": 1},
    "4:2:0": {"quality": 40, "subsampling": 2},
    "progressive": {"quality": 85, "progressive": True},
    "restarts": {"quality": 85, "restart_marker_blocks": 2},
    "colours as they are": {"quality": 85, "keep_rgb": True},
    "a profile and a comment": {"icc_profile": bytes(3000), "comment": "x" * 500},
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_pillows(tmp_path: Path, name: str, mode: str) -> None:
    if mode == "CMYK" and "keep_rgb" in JPEGS[name]:
        pytest.skip("Pillow writes no such file")
    path = tmp_path / "image.jpg"
    photograph().convert(mode).save(path, **JPEGS[name])
    read = read_image(str(path))
    assert read.dtype == torch.uint8
    assert (read.int() - by_pillow(path).int()).abs().max() <= 2


def test_jpegs_are_decoded_natively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others by Pillow: grey, colour, CMYK; and where torchvision is built without."""
    decoded: list[str] = []
    pillow = decoding._rgb
    monkeypatch.setattr(decoding, "_rgb", lambda image: decoded.append(image.mode) or pillow(image))
    for i, mode in enumerate(["RGB", "L", "CMYK"]):
        photograph().convert(mode).save(tmp_path / f"{i}.jpg")
        read_image(str(tmp_path / f"{i}.jpg"))
    assert decoded == ["CMYK"]
    monkeypatch.setattr(decoding.torch.ops, "image", object())
    assert torch.equal(read_image(str(tmp_path / "0.jpg")), by_pillow(tmp_path / "0.jpg"))
    assert decoded == ["CMYK", "RGB"]


PNGS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "colour": lambda image: image,
    "grey": lambda image: image.convert("L"),
    "black and white": lambda image: image.convert("1"),
    "transparent": lambda image: image.convert("RGBA"),
    "grey, transparent": lambda image: image.convert("LA"),
    "palette": lambda image: image.quantize(200),
    "palette of 4 bits": lambda image: image.quantize(9),
    "16 bits": lambda image: Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 251),
}


@pytest.mark.parametrize("extra", [True, False], ids=["imagecodecs", "Pillow"])
@pytest.mark.parametrize("name", PNGS)
@pytest.mark.parametrize("transparency", [None, 3])
def test_pngs_are_pillows(
    tmp_path: Path, name: str, transparency: int | None, extra: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not extra:
        monkeypatch.setattr(decoding, "_png_codecs", lambda: None)
    image = PNGS[name](photograph())
    if image.mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    clear = {} if transparency is None or image.mode not in ("P", "L") else {"transparency": transparency}
    image.save(tmp_path / "image.png", **clear)
    read = read_image(str(tmp_path / "image.png"))
    assert (read.int() - by_pillow(tmp_path / "image.png").int()).abs().max() <= 1


def test_plain_pngs_are_decoded_by_libpng(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others by Pillow; all of them without the extra."""
    decoded: list[str] = []
    pillow = decoding._rgb
    monkeypatch.setattr(decoding, "_rgb", lambda image: decoded.append(image.mode) or pillow(image))
    for name, make in PNGS.items():
        make(photograph()).save(tmp_path / f"{name}.png")
        read_image(str(tmp_path / f"{name}.png"))
    assert decoded == ["1", "RGBA", "LA", "P", "P", "I;16"]
    photograph().save(tmp_path / "clear.png", transparency=(0, 0, 0))
    assert torch.equal(read_image(str(tmp_path / "clear.png")), by_pillow(tmp_path / "clear.png"))
    assert decoded[6:] == ["RGB"]
    decoding._png_codecs.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    try:
        assert torch.equal(read_image(str(tmp_path / "colour.png")), by_pillow(tmp_path / "colour.png"))
    finally:
        decoding._png_codecs.cache_clear()
    assert decoded[7:] == ["RGB"]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_pngs_gamma_is_not_applied(tmp_path: Path, mode: str) -> None:
    """As Pillow and torchvision do not."""
    photograph().convert(mode).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    chunk = b"gAMA" + (100_000).to_bytes(4, "big")  # linear
    content = content[:33] + (4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + content[33:]
    (tmp_path / "gamma.png").write_bytes(content)
    assert torch.equal(read_image(str(tmp_path / "gamma.png")), by_pillow(tmp_path / "image.png"))


@pytest.mark.parametrize("written", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_the_content_says_what_a_file_is(tmp_path: Path, written: str, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    photograph().save(path, format=written)
    assert (read_image(str(path)).int() - by_pillow(path).int()).abs().max() <= 2


def read_as_by_pillow(path: Path, content: bytes | bytearray, most: int) -> bool:
    """Whether Pillow reads a file of this content, and so do we, to ``most`` levels; else both raise the same error."""
    path.write_bytes(content)
    try:
        expected = by_pillow(path)
    except Exception as error:  # of many kinds
        with pytest.raises(type(error), match=re.escape(str(error))):
            read_image(str(path))
        return False
    read = read_image(str(path))
    assert read.shape == expected.shape
    assert (read.int() - expected.int()).abs().max() <= most
    return True


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}])
def test_a_cut_file_is_read_where_pillow_reads_it(tmp_path: Path, options: dict[str, object]) -> None:
    """Wherever it is cut."""
    photograph(24, 24).save(tmp_path / "whole", **options)
    content = (tmp_path / "whole").read_bytes()
    lengths = [*range(0, len(content), 7), len(content) - 1]
    most = 0 if options["format"] == "PNG" else 2
    read = [read_as_by_pillow(tmp_path / "cut", content[:length], most) for length in lengths]
    assert read.count(False) > 50


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_a_damaged_jpeg_is_read_where_pillow_reads_it(tmp_path: Path, options: dict[str, object]) -> None:
    photograph(24, 24).save(tmp_path / "whole.jpg", **options)
    content, read = (tmp_path / "whole.jpg").read_bytes(), set()
    generator = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(content)
        for place in generator.integers(2, len(content), 3):
            damaged[place] = generator.integers(256)
        read.add(read_as_by_pillow(tmp_path / "damaged.jpg", damaged, 2))
    assert read == {True, False}


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_damaged_png_is_read_where_pillow_reads_it(tmp_path: Path, mode: str) -> None:
    """Wherever it is damaged; torchvision's decoder ends the process at some places."""
    photograph(24, 24).convert(mode).save(tmp_path / "whole.png")
    content, read = (tmp_path / "whole.png").read_bytes(), set()
    for place in [*range(0, len(content) - 30, 7), *range(len(content) - 30, len(content))]:
        damaged = bytearray(content)
        damaged[place] ^= 255
        read.add(read_as_by_pillow(tmp_path / "damaged.png", damaged, 0))
    assert read == {True, False}


def test_no_file_and_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(str(tmp_path / "none.jpg"))
    for suffix in ("jpg", "png"):
        photograph().save(tmp_path / f"large.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for suffix in ("jpg", "png"):
        with pytest.raises(Image.DecompressionBombError):
            read_image(str(tmp_path / f"large.{suffix}"))


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "image.tiff")
    assert "32-bit float pixels" in fails(lambda: check_images([str(tmp_path / "image.tiff")], "--data.source"))


def test_orientation_is_as_in_torchvision(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "class").mkdir()
    Image.new("RGB", (8, 4)).save(tmp_path / "class" / "image.jpg", exif=exif)
    assert read_image(str(tmp_path / "class" / "image.jpg")).shape == (3, 4, 8)
    assert ImageFolder(str(tmp_path))[0][0].size == (8, 4)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    good = tmp_path / "good.jpg"
    noise.save(good)
    paths = [str(good)]
    for suffix in (".jpg", ".png"):
        noise.save(tmp_path / f"whole{suffix}")
        content = (tmp_path / f"whole{suffix}").read_bytes()
        (tmp_path / f"truncated{suffix}").write_bytes(content[: len(content) // 2])
        paths.append(str(tmp_path / f"truncated{suffix}"))
    flipped = bytearray((tmp_path / "whole.png").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (tmp_path / "flipped.png").write_bytes(flipped)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("<html>404</html>")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    bad = ["truncated.jpg", "truncated.png", "flipped.png", "empty.png", "text.png", "dangling.png"]
    for name in bad:
        message = fails(lambda name=name: check_images([str(good), str(tmp_path / name)], "--data.source"))
        assert "Expected every file of `--data.source` to be an image that can be read, but 1 of 2 cannot" in message
        assert f"'{tmp_path / name}': " in message
        assert str(good) not in message
    assert "empty.png': empty." in fails(lambda: check_images([str(tmp_path / "empty.png")], "x"))
    assert "text.png': not an image." in fails(lambda: check_images([str(tmp_path / "text.png")], "x"))
    assert "dangling.png': No such file or directory." in fails(lambda: check_images([str(tmp_path / bad[-1])], "x"))
    message = fails(lambda: check_images([str(good)] * 100 + [str(tmp_path / name) for name in bad], "--data.target"))
    assert "6 of 106 cannot" in message
    assert message.count("': ") == 5
    assert "; and 1 more. Remove or mend them." in message
    check_images([str(good)] * 50, "--data.source")


# ---------------------------------------------------------------------- splits
def test_split_is_complete_disjoint_and_stratified() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 10
    test, val, train = stratified_split(labels, [0.2, 0.1], seed=0)
    assert sorted(test + val + train) == list(range(90))
    for part, fraction in ((test, 0.2), (val, 0.1), (train, 0.7)):
        assert part == sorted(part)
        for label, count in enumerate((50, 30, 10)):
            assert sum(labels[i] == label for i in part) == round(fraction * count)


def test_split_depends_on_the_seed_alone() -> None:
    labels = [i % 3 for i in range(60)]
    torch.manual_seed(0)
    first = stratified_split(labels, [0.3], seed=1)
    torch.manual_seed(1)
    assert stratified_split(labels, [0.3], seed=1) == first
    assert stratified_split(labels, [0.3], seed=2) != first


def test_split_is_random_within_a_class() -> None:
    held_out, _ = stratified_split([0] * 100, [0.5], seed=0)
    assert held_out != list(range(50))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_training_keeps_one_of_each_class(count: int) -> None:
    labels = [label for label in range(5) for _ in range(count)]
    *_, train = stratified_split(labels, [0.5, 0.49], seed=0)
    assert {labels[i] for i in train} == set(range(5))


def test_nothing_is_held_out_for_a_fraction_of_zero() -> None:
    assert stratified_split([0, 1, 0], [0.0], seed=0) == [[], [0, 1, 2]]
