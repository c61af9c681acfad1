"""What all tests share: one thread, a quiet Lightning, small folders of images."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


@pytest.fixture(autouse=True)
def process() -> None:
    """Tests do not depend on their order: none finds the seed, threads or loggers that another has set."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("framework").setLevel(logging.INFO)
    torch.manual_seed(0)


def write_images(
    folder: Path, classes: list[str] | None = None, count: int = 6, size: int = 16, offset: int = 0, seed: int = 0
) -> Path:
    """Noise images whose brightness tells the class: ``folder/<class>/<i>.png``, without classes ``folder/<i>.png``."""
    generator = np.random.default_rng(seed)
    for index, name in enumerate(classes or [""]):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = generator.integers(0, 64, (size, size, 3)) + 60 * index + offset
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source`` and ``target_test`` with three classes, ``target`` without class folders."""
    root = tmp_path_factory.mktemp("domains")
    classes = ["ant", "bee", "cat"]
    write_images(root / "source", classes, count=13, seed=1)
    write_images(root / "target", None, count=31, offset=40, seed=2)
    write_images(root / "target_test", classes, count=5, offset=40, seed=3)
    return root


@pytest.fixture(scope="session")
def images() -> Callable[..., Path]:
    """The writer of small image folders."""
    return write_images
