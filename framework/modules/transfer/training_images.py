"""A pass over the training images before training: for methods that first learn something about the new task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as L
import torch
from torch import Tensor

from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.inspection import undisturbed


@contextmanager
def evaluated_training_images(module: L.LightningModule) -> Iterator[Iterator[LabelledBatch]]:
    """Batches of this process's share of the training images, on its device, with the module in evaluation mode.

    To be called in ``on_fit_start``, where a checkpoint is restored already. Afterwards the modes of all parts and the
    state of all random generators are as before, so that the run that follows is the same with and without the pass.
    No gradients.

    The images come from the datamodule's ``unaugmented_train_dataloader()``: all labelled training images, each once
    over all processes, transformed as in evaluation.

    Raises:
        ConfigurationError: the run's data have no such method.
    """
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    loader = getattr(data, "unaugmented_train_dataloader", None)
    if loader is None:
        given = "loaders without a datamodule" if data is None else type(data).__name__
        raise ConfigurationError(
            f"Expected `--data` to have the method `unaugmented_train_dataloader()`, since {type(module).__name__} "
            f"looks at the training images once before training, but got {given}. Use ImageFolderDataModule, or add "
            "the method: a loader of LabelledBatch over all training images, without augmentation, each image once "
            "over all processes."
        )
    with undisturbed(module):
        yield (module.trainer.strategy.batch_to_device(batch, module.device) for batch in loader())


def gathered_rows(module: L.LightningModule, rows: Tensor) -> Tensor:
    """The rows ``[n, ...]`` of all processes, ``[N, ...]``; ``n`` may differ.

    The first row of each process, then the second: where process ``r`` of ``W`` has the images ``r``, ``r + W``, … they
    are in the order of the data, whatever ``W`` is.
    """
    if module.trainer.world_size == 1:
        return rows
    count = torch.tensor(len(rows), device=rows.device)
    counts = module.all_gather(count)
    assert isinstance(counts, Tensor)
    most = int(counts.max())
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    gathered = module.all_gather(padded)  # [W, most, ...]
    assert isinstance(gathered, Tensor)
    there = torch.arange(most, device=rows.device)[:, None] < counts  # [most, W]
    return gathered.transpose(0, 1)[there]
