"""Threads that make batches ahead: the same batches, errors where they are due, and nothing left behind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from framework import DANN, DomainPairDataModule, ImageFolderDataModule, Trainer
from framework.datamodules.datasets import whole
from framework.datamodules.workers import ThreadedLoader, image_loader
from framework.errors import ConfigurationError


def tensors(batch: Any) -> list[Tensor]:
    """What is in a batch, however deep."""
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for part in batch for tensor in tensors(part)] if isinstance(batch, tuple) else []


def threads() -> list[threading.Thread]:
    """Those that make batches."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def served(data: Any) -> list[Tensor]:
    """All of two epochs of training and one of every evaluation."""
    found = []
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
        if stage == "fit":
            train = data.train_dataloader()
            loaders = [train, train, *data.val_dataloader()]
        else:
            loaders = [getattr(data, f"{stage}_dataloader")()]
        for loader in loaders:
            batches = [batch[0] if type(batch) is tuple else batch for batch in loader]  # a CombinedLoader's has more
            found += [tensor for batch in batches for tensor in tensors(batch)]
    return found


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache": "memory", "views": 2, "crop": "random_resized", "color_jitter": 0.5, "blur": 0.5},
        {"augment_on": "device"},
    ],
    ids=["decoded", "cached", "device"],
)
def test_the_same_batches(domains: Path, count: int, options: dict[str, Any]) -> None:
    expected = served(contract.build_data(domains, num_workers=0, **options))
    found = served(contract.build_data(domains, num_workers=count, workers="threads", **options))
    assert len(found) == len(expected) > 40
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not threads()


def test_threads_where_images_are_cached(domains: Path) -> None:
    def loader(**options: Any) -> Any:
        data = ImageFolderDataModule(str(domains / "source"), batch_size=4, image_size=16, **options)
        data.setup("fit")
        return data.train_dataloader()

    assert isinstance(loader(cache="memory"), ThreadedLoader)
    assert not isinstance(loader(), ThreadedLoader)
    assert loader().num_workers == 2
    assert isinstance(loader(workers="threads"), ThreadedLoader)
    assert not isinstance(loader(cache="memory", num_workers=0), ThreadedLoader)
    assert loader(cache="memory", workers="processes").num_workers == 2


class Own(ImageFolderDataModule):
    """A transform that draws from torch's generator."""

    @property
    def train_transform(self) -> v2.Transform:
        return v2.Compose([v2.Resize((16, 16)), v2.RandomHorizontalFlip()])


def test_a_transform_that_may_share_a_generator_gets_processes(domains: Path) -> None:
    data = Own(str(domains / "source"), batch_size=4, image_size=16, workers="threads", num_workers=1)
    data.setup("fit")
    loader = data.train_dataloader()
    assert not isinstance(loader, ThreadedLoader)
    assert loader.num_workers == 1


def test_a_kind_that_there_is_not() -> None:
    with pytest.raises(ConfigurationError, match=r"`--data\.workers` to be 'threads' or 'processes', but got 'fibres'"):
        DomainPairDataModule("a", "b", workers="fibres")  # type: ignore[arg-type]


def test_a_resumed_run_with_threads(domains: Path, tmp_path: Path) -> None:
    """In mid-epoch, where batches had been made ahead that were never used."""
    path = tmp_path / "run.ckpt"
    data = {"workers": "threads", "num_workers": 2, "horizontal_flip": True}
    plain = contract.weights(contract.fit(DANN, domains, data={"num_workers": 0}))
    threaded = contract.weights(contract.fit(DANN, domains, save=(7, path), data=data))
    rest = contract.weights(contract.fit(DANN, domains, resume=path, data=data))
    assert contract.equal(plain, threaded)
    assert contract.equal(plain, rest)
    assert not threads()


def test_overfitting_on_a_few_batches(domains: Path) -> None:
    data = contract.build_data(domains, workers="threads", num_workers=1)
    trainer = Trainer(
        max_epochs=2,
        overfit_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(contract.build_model(DANN), data)
    assert trainer.global_step == 4


class Numbers:
    """Batches of their indices, but for one."""

    def __len__(self) -> int:
        return 40

    def __getitems__(self, indices: list[int]) -> Tensor:
        if 20 in indices:
            raise ValueError("number 20")
        return torch.tensor(indices)


def numbers(count: int = 2, dataset: Any = None) -> Any:
    return image_loader(
        dataset or Numbers(), count, "threads", batch_size=4, collate_fn=whole, persistent_workers=False
    )


def test_an_error_is_raised_where_it_is_due() -> None:
    batches = iter(numbers())
    assert [next(batches).tolist() for _ in range(5)] == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    with pytest.raises(ValueError, match="number 20"):
        next(batches)
    assert not threads()


def test_an_epoch_that_is_left_leaves_no_thread() -> None:
    batches = iter(numbers(3))
    assert next(batches).tolist() == [0, 1, 2, 3]
    assert 1 <= len(threads()) <= 3
    del batches
    assert not threads()


def test_batches_are_made_ahead_and_not_all() -> None:
    made: list[int] = []

    class Counting(Numbers):
        def __getitems__(self, indices: list[int]) -> Tensor:
            made.append(indices[0])
            return torch.tensor(indices)

    batches = iter(
        image_loader(Counting(), 1, "threads", batch_size=4, persistent_workers=False, collate_fn=lambda b: b)
    )
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert made[0] == 0
    assert len(made) <= 4  # that one, two ahead, and one in the making
