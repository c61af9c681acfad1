"""Images without labels, of one folder or of several: what self-supervised pre-training learns from."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, Dataset

from framework.batch import UnlabelledBatch
from framework.datamodules.base import ImageDataModule
from framework.datamodules.datasets import ImagesAlone
from framework.datamodules.folders import unlabelled_images
from framework.datamodules.several_folders import check_equal_shares, check_same_folders, folder_list, folders_state
from framework.datamodules.streams import SeededDraws
from framework.errors import ConfigurationError

VALIDATION_STREAM = 15
"""The number of the stream that validation's augmentations are drawn from; training's begin at 0."""


class UnlabelledFolderDataModule(ImageDataModule):
    """Images alone, from one folder or from several, such as the source and the target of an adaptation.

    Images are found at any depth; class folders are not looked at, so that labels cannot reach training. A batch is an
    :class:`~framework.batch.UnlabelledBatch`. Every batch of ``batch_size`` images holds equally many of each of the
    ``S`` folders, whatever their sizes; image ``i`` is of folder ``i % S``. Each is an endless stream with an order and
    augmentations of its own, and is split by itself. By default an epoch has as many images as all folders together.

    With ``views`` above 1, validation has as many random views of each image too, the same ones at every validation;
    with one view it has the images as every evaluation does, without augmentation.

    Args:
        folders: a folder, or several. From the shell ``--data.folders a``, ``--data.folders '[a, b]'`` or
            ``--data.folders a --data.folders+=b``.
        options: those of :class:`~framework.datamodules.base.ImageDataModule`, without ``labels_per_class``;
            ``val_fraction`` is of each folder.
    """

    batch_type: ClassVar[type] = UnlabelledBatch

    def __init__(self, folders: str | list[str], **options: Any) -> None:
        super().__init__(**options)
        if self.labels_per_class is not None:
            raise ConfigurationError(
                f"Expected no `--data.labels_per_class` with {type(self).__name__}, which reads no labels, but got "
                f"{self.labels_per_class}. Remove it."
            )
        self.folders = folder_list(folders, "--data.folders")
        check_equal_shares(self.folders, "--data.folders", self.batch_size)

    def _scan(self, stage: str) -> None:
        if stage not in ("fit", "validate"):
            raise ConfigurationError(
                f"Expected `--data` to hold what `{stage}` needs, but {type(self).__name__} serves images without "
                "classes, to `fit` and `validate` only. Take `--data ImageFolderDataModule`."
            )
        folders = [unlabelled_images(folder, "--data.folders") for folder in self.folders]
        for files in folders:
            self._check_files("--data.folders", files)
        self.train_files, val = self._held_out(folders)
        # else a batch would be of one class where classes have folders, and so would its statistics and contrasts
        order = torch.randperm(len(val), generator=torch.Generator().manual_seed(self.seed))
        self.val_files = val.subset(order.tolist())
        if self._stage == "fit":
            self._check_enough("--data.folders", self.train_files, "--data.batch_size", self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """As every datamodule's; of several folders also which they are, in the order of the domains."""
        several = folders_state(self.folders)
        return super().state_dict() | ({} if several is None else {"folders": several})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position.

        Raises:
            ConfigurationError: as every datamodule, or a run would go on with more or fewer folders, or with the same
                in another order.
        """
        if self._stage == "fit":
            check_same_folders(state.get("folders"), self.folders, "--data.folders")
        super().load_state_dict(state)

    def train_dataloader(self) -> DataLoader[Any]:
        """An endless stream of images cut into epochs."""
        return self._train_loader(
            self.train_files, self.batch_size, self._steps(len(self.train_files)), samples=ImagesAlone
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Images that were held out, in as many views as in training."""
        images: Dataset[Any]
        if self.views > 1:
            images = SeededDraws(
                self._training_images(ImagesAlone, self.val_files), self._stream_seed(VALIDATION_STREAM)
            )
        else:
            images = self._evaluation_images(ImagesAlone, self.val_files)
        return self._eval_loader(images, "--data.folders")
