"""From image files to pixels, and clear words for files that are no images."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as transforms

from framework.errors import ConfigurationError

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # what the files begin with


def read_image(path: str) -> Tensor:
    """The pixels of an image file, uint8, ``[3, H, W]``.

    Grey and palette images become RGB, 16-bit grey ones are scaled to 8 bits. Transparency is dropped, and the
    orientation of EXIF is not applied, as in torchvision's ``ImageFolder``. What the file is, its content says and not
    its name.

    Raises:
        OSError, ValueError, SyntaxError: as Pillow does, for a file that it cannot decode.
    """
    with open(path, "rb") as file:  # noqa: PTH123 (for each image)
        start = file.read(8)
        content = bytearray(start + file.read()) if start.startswith((JPEG, PNG)) else bytearray()
    plain: Tensor | None = None
    if content.startswith(JPEG) and hasattr(torch.ops.image, "decode_jpeg") and _is_plain_jpeg(content):
        with contextlib.suppress(RuntimeError):  # then Pillow says what is wrong with it, or can read it
            # not through torchvision.io, which warns at every call that another package will follow it one day
            coded = torch.frombuffer(content, dtype=torch.uint8)
            plain = torch.ops.image.decode_jpeg(coded, ImageReadMode.RGB.value, False)
    elif content.startswith(PNG) and _is_plain_png(content):
        plain = _decode_png(content)
    if plain is not None:
        return plain
    with Image.open(path) as image:
        pixels: Tensor = transforms.pil_to_tensor(_rgb(image))
    return pixels


def _decode_png(content: bytearray) -> Tensor | None:
    """By libpng in the extra ``png``, in 0.7 of Pillow's time; None without it, and where it refuses the file.

    Not by torchvision: 0.29 ends the whole process at damaged pixels, and is hardly faster than Pillow.
    """
    codecs = _png_codecs()
    if codecs is None:
        return None
    try:
        pixels = torch.from_numpy(codecs.png_decode(bytes(content)))
    except codecs.PngError:
        return None
    if pixels.ndim == 2:
        pixels = pixels[..., None].repeat(1, 1, 3)
    return pixels.permute(2, 0, 1) if pixels.shape[2] == 3 else None  # another number: a transparent colour


@functools.cache
def _png_codecs() -> Any:
    with contextlib.suppress(ImportError):
        import imagecodecs

        return imagecodecs
    return None


def _is_plain_png(content: bytearray) -> bool:
    """Whether it is grey or has colours, of 8 bits, without a palette, and no bomb to Pillow."""
    if len(content) < 33 or content[12:16] != b"IHDR":
        return False
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    return content[24] == 8 and content[25] in (0, 2) and height * width <= _most_pixels()


def _most_pixels() -> int:
    return Image.MAX_IMAGE_PIXELS or 2**32


def _is_plain_jpeg(content: bytearray) -> bool:
    """Whether it is grey or has three colours (of CMYK there are several readings: Pillow's), and no bomb to Pillow.

    Read from the frame's header, in a tenth of the time that Pillow takes to open a file.
    """
    at = 2
    while at + 9 < len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # what else is there are tables
            height, width = (int.from_bytes(content[at + i : at + i + 2], "big") for i in (5, 7))
            return content[at + 9] in (1, 3) and height * width <= _most_pixels()
        at += 2 + length
    return False


def read_pixels(path: str) -> Tensor:
    """As :func:`read_image`.

    Raises:
        ConfigurationError: the file cannot be read; names it.
    """
    try:
        return read_image(path)
    except Exception as error:  # Pillow raises many kinds
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> ConfigurationError:
    """What is said of an image that cannot be read."""
    return ConfigurationError(
        f"Expected '{path}' to be an image that can be read, but got {type(error).__name__}: {error}. "
        "`--data.check_images true` finds such files before training."
    )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16 and its like; Pillow reads 16-bit PGM as I, and would clip all of them at 255
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def check_images(paths: Sequence[str], flag: str) -> None:
    """Decode every file once.

    Raises:
        ConfigurationError: files that cannot be decoded; names the first ones.
    """

    def problem(path: str) -> str | None:
        try:
            with Image.open(path) as image:
                image.draft("RGB", (1, 1))  # a JPEG is read to its end, but not brought to full size
                _rgb(image)
        except Exception as error:  # Pillow raises many kinds: whatever it is, this file cannot be used
            return f"'{path}': {_reason(error, path)}"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = [text for text in pool.map(problem, paths, chunksize=16) if text is not None]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else "")
        raise ConfigurationError(
            f"Expected every file of `{flag}` to be an image that can be read, but {len(problems)} of {len(paths)} "
            f"cannot: {shown}. Remove or mend them."
        )


def _reason(error: Exception, path: str) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "empty" if os.path.getsize(path) == 0 else "not an image"  # noqa: PTH202
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
