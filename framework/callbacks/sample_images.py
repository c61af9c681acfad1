"""Sample images in TensorBoard."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from framework.batch import DomainBatch, LabelledBatch, UnlabelledBatch
from framework.progress import batches_processed


class SampleImages(L.Callback):
    """Shows images of the first training batch once, as the network sees them: ``train/source``, ``train/target``.

    Of several source folders, each has a grid of its own, by its number: ``train/source_0``, ``train/source_1``, …;
    of several unlabelled folders ``train/folder_0``, …. One folder alone is ``train/images``.

    Args:
        most: images a domain.
    """

    def __init__(self, most: int = 32) -> None:
        self.most = most

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the grids at the first batch of a run."""
        if batch_idx or batches_processed(trainer) or not trainer.is_global_zero:
            return
        if isinstance(batch, DomainBatch):
            images = {**_by_domain(batch.source), "target": batch.target}
        elif isinstance(batch, UnlabelledBatch):
            images = _by_folder(batch.images, len(getattr(trainer.datamodule, "folders", [])))  # type: ignore[attr-defined]
        elif isinstance(batch, LabelledBatch):
            images = {"images": batch.images}
        else:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, tensor in images.items():
                    logger.experiment.add_image(f"train/{name}", self._grid(trainer, tensor), 0)

    def _grid(self, trainer: L.Trainer, images: Tensor) -> Tensor:
        images = images.flatten(0, -4)  # several views of an image stand side by side
        images = images[: self.most].detach().cpu().float()
        denormalize = getattr(trainer.datamodule, "denormalize", None)  # type: ignore[attr-defined]
        if denormalize is None:  # loaders of the user's own: stretch each image to [0, 1]
            grid: Tensor = make_grid(images, nrow=8, normalize=True, scale_each=True)
        else:
            grid = make_grid(denormalize(images), nrow=8)
        return grid


def _by_domain(source: LabelledBatch) -> dict[str, Tensor]:
    domains = [] if source.domains is None else torch.unique(source.domains).tolist()
    if source.domains is None or len(domains) < 2:
        return {"source": source.images}
    return {f"source_{domain}": source.images[source.domains == domain] for domain in domains}


def _by_folder(images: Tensor, folders: int) -> dict[str, Tensor]:
    if folders < 2:
        return {"images": images}
    return {f"folder_{folder}": images[folder::folders] for folder in range(folders)}
