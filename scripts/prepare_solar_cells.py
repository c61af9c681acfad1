"""Write two ImageFolders of solar cells from the package elpv-dataset: nothing is downloaded.

    python scripts/prepare_solar_cells.py --output data/solar_cells

====== ================================ ================================ ======================================
domain training images                  test images                      what it is
====== ================================ ================================ ======================================
mono   676: 441 functional, 235 defect. 225: 147 functional, 78 defect.  cells of monocrystalline modules
poly   992: 690 functional, 302 defect. 330: 230 functional, 100 defect. cells of polycrystalline modules, whose
                                                                         grain looks like many small faults
====== ================================ ================================ ======================================

The images are 2,624 real electroluminescence photographs of solar cells, 300 x 300 pixels, 8-bit grey (Buerhop et al.
2018, "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence Imagery"; Deitsch et al.
2019 and 2021). **Their licence is CC BY-NC-SA 4.0: not for commercial use.** Experts gave each a probability of a
defect: 0, 1/3, 2/3 or 1. The sure ones are written, 0 as ``functional`` and 1 as ``defective``; with ``--uncertain
include`` the 401 others too, 1/3 as functional and 2/3 as defective.

Every image is copied as it is to ``OUTPUT/<domain>/<train or test>/<functional or defective>/<cell number>.png``. A
quarter of each class is for the test, chosen by the seed. The package does not say which module a cell is from, so
cells of one module can be in both parts: accuracies are those for more cells of known modules.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from preparation import Image, Preparation, PreparationError, missing_package, stratified_split

TEST_SHARE = 0.25
CLASSES = ("functional", "defective")
CERTAIN = 1e-6  # probabilities this near to 0 or 1 are sure


def load_cells(kind: str, uncertain: bool) -> tuple[list[Path], list[int]]:
    """The files of the cells of a kind of module, ``mono`` or ``poly``, and whether each is defective."""
    try:
        import elpv_dataset
    except ImportError as error:
        raise missing_package(error, "solar") from error
    folder = Path(next(iter(elpv_dataset.__path__))) / "data"
    files, labels = [], []
    for line in (folder / "labels.csv").read_text(encoding="utf-8").splitlines():
        name, probability, module = line.split()
        defective = float(probability)
        if module == kind and (uncertain or min(defective, 1 - defective) < CERTAIN):
            files.append(folder / name)
            labels.append(int(defective > 0.5))
    if not files:
        raise PreparationError(f"Expected the package elpv-dataset to hold {kind} cells, but found none in '{folder}'.")
    return files, labels


def cell_images(kind: str, options: argparse.Namespace) -> Iterator[Image]:
    """The cells of one kind of module."""
    files, labels = load_cells(kind, options.uncertain == "include")
    try:
        import numpy as np
    except ImportError as error:
        raise missing_package(error, "solar") from error
    train, test = stratified_split(np.array(labels), round(TEST_SHARE * len(files)), options.seed)
    for part, indices in (("train", train), ("test", test)):
        for index in indices:
            yield Image(part, CLASSES[labels[index]], files[index].stem, files[index])


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--uncertain",
        choices=["omit", "include"],
        default="omit",
        help="cells of which the experts were not sure (default: %(default)s)",
    )


SOLAR_CELLS = Preparation(
    script="prepare_solar_cells.py",
    description="Write ImageFolders of solar cells from the package elpv-dataset (no download; CC BY-NC-SA 4.0).",
    output=Path("data/solar_cells"),
    domains={kind: partial(cell_images, kind) for kind in ("mono", "poly")},
    extra="solar",
    choices=("uncertain",),
    add_options=_add_options,
)
build_parser, main = SOLAR_CELLS.build_parser, SOLAR_CELLS.main


if __name__ == "__main__":
    SOLAR_CELLS.run()
