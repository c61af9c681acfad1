"""Labelled source folders and an unlabelled target folder, paired batch by batch."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from framework.batch import DomainBatch
from framework.datamodules.base import ImageDataModule
from framework.datamodules.checks import check_at_least
from framework.datamodules.datasets import ImagesWithPaths, LabelledImages, UnlabelledImages
from framework.datamodules.folders import (
    common_class_names,
    joined,
    labelled_images,
    unlabelled_images,
)
from framework.datamodules.several_folders import check_equal_shares, check_same_folders, folder_list, folders_state
from framework.errors import ConfigurationError


class DomainPairDataModule(ImageDataModule):
    """Pairs a labelled source ImageFolder with an unlabelled target folder for unsupervised domain adaptation.

    A training batch is a :class:`~framework.batch.DomainBatch`; it has no target labels, whatever the target folder
    looks like. Validation has two loaders: labelled source images and unlabelled target images. Target labels are read
    in ``test`` only, from ``target_test``.

    ``source`` may name several folders with the same classes: each is a domain of its own, and
    ``batch.source.domains`` says which of them an image is from. Every batch of ``batch_size`` source images holds
    equally many of each of the ``S`` folders, whatever their sizes; image ``i`` is of folder ``i % S``. Each is an
    endless stream with an order and augmentations of its own. By default an epoch has as many images as all folders
    together, so that a small folder comes around more than once in it and a large one less. Each folder is split by
    itself.

    Args:
        source: ImageFolder of the labelled domain, ``source/<class>/*``, or several with the same class names. From the
            shell ``--data.source a``, ``--data.source '[a, b]'`` or ``--data.source a --data.source+=b``.
        target: folder of the unlabelled domain; images at any depth, class folders are not looked at.
        source_val: ImageFolder for validation, or several that are evaluated together; default: ``val_fraction`` of
            each source folder, each class by itself. With a ``val_fraction`` of 0, the training images without
            augmentation.
        target_val: folder of target images for label-free validation; default: as ``source_val``.
        target_test: labelled ImageFolder of the target domain, for ``test``. In the published protocols it is the
            target folder itself.
        predict: folder of images for ``predict``; default: the target.
        target_batch_size: target images per step and rank; default: ``batch_size``.
        options: those of :class:`~framework.datamodules.base.ImageDataModule`.
    """

    batch_type: ClassVar[type] = DomainBatch

    def __init__(
        self,
        source: str | list[str],
        target: str,
        *,
        source_val: str | list[str] | None = None,
        target_val: str | None = None,
        target_test: str | None = None,
        predict: str | None = None,
        target_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_at_least("--data.target_batch_size", target_batch_size, 1)
        self.source, self.target = source, target
        self.sources = folder_list(source, "--data.source")  # one domain each
        self.source_val, self.target_val = source_val, target_val
        self.source_vals = None if source_val is None else folder_list(source_val, "--data.source_val")
        self.target_test, self.predict = target_test, predict
        self.target_batch_size = target_batch_size or self.batch_size
        check_equal_shares(self.sources, "--data.source", self.batch_size)

    @property
    def class_names(self) -> list[str]:
        """The source's class folders, sorted."""
        return common_class_names(self.sources, "--data.source")

    def _scan(self, stage: str) -> None:
        classes = self.class_names
        if stage in ("fit", "validate"):
            self._scan_training(classes)
        if stage == "test" and self.target_test is None:
            raise ConfigurationError(
                "Expected `--data.target_test` to be a labelled folder of the target domain, but got none: `test` "
                "needs labels. It may be the target folder itself, as in the published protocols."
            )
        if stage in ("fit", "test") and self.target_test is not None:
            # in fit already, so that other class names do not come to light after the training
            self.target_test_files = labelled_images(self.target_test, "--data.target_test", classes)
            self._check_files("--data.target_test", self.target_test_files)
        if stage == "predict":
            folder, flag = (self.target, "--data.target") if self.predict is None else (self.predict, "--data.predict")
            self.predict_files = unlabelled_images(folder, flag)

    def _scan_training(self, classes: list[str]) -> None:
        sources = [labelled_images(folder, "--data.source", classes) for folder in self.sources]
        target = unlabelled_images(self.target, "--data.target")
        for source in sources:
            self._check_files("--data.source", source)
        self._check_files("--data.target", target)
        if self.source_vals is None:
            train, val = self._held_out(sources, "source_")
            self.source_files, self.source_val_files = self._with_few_labels(train, val, "source_")
        else:
            self.source_files, _ = self._with_few_labels(joined(sources), joined(sources), "source_")
            source_vals = [labelled_images(folder, "--data.source_val", classes) for folder in self.source_vals]
            for source in source_vals:
                self._check_files("--data.source_val", source)
            self.source_val_files = joined(source_vals)
        if self.target_val is None:
            self.target_files, self.target_val_files = self._held_out([target], "target_")
        else:
            self.target_files = target
            self.target_val_files = unlabelled_images(self.target_val, "--data.target_val")
            self._check_files("--data.target_val", self.target_val_files)
        if self._stage == "fit":
            self._check_enough("--data.source", self.source_files, "--data.batch_size", self.batch_size)
            flag = "--data.batch_size" if self.target_batch_size == self.batch_size else "--data.target_batch_size"
            self._check_enough("--data.target", self.target_files, flag, self.target_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """As every datamodule's; of several source folders also which they are, in the order of the domains."""
        several = folders_state(self.sources)
        return super().state_dict() | ({} if several is None else {"sources": several})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position.

        Raises:
            ConfigurationError: as every datamodule, or a run would go on with more or fewer source folders, or with the
                same in another order.
        """
        if self._stage == "fit":
            check_same_folders(state.get("sources"), self.sources, "--data.source")
        super().load_state_dict(state)

    def train_dataloader(self) -> CombinedLoader:
        """Two endless streams cut into epochs of the same length; batches are ``DomainBatch``."""
        steps = self._steps(len(self.source_files))
        source = self._train_loader(self.source_files, self.batch_size, steps, stream=0)
        target = self._train_loader(
            self.target_files, self.target_batch_size, steps, stream=1, samples=UnlabelledImages
        )
        return CombinedLoader(DomainBatch(source, target), "min_size")  # type: ignore[arg-type]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Labelled source images, then unlabelled target images."""
        return [
            self._eval_loader(self._evaluation_images(LabelledImages, self.source_val_files), "--data.source_val"),
            self._eval_loader(self._evaluation_images(UnlabelledImages, self.target_val_files), "--data.target_val"),
        ]

    def test_dataloader(self) -> DataLoader[Any]:
        """Labelled target images: the only place where target labels are read."""
        return self._eval_loader(self._evaluation_images(LabelledImages, self.target_test_files), "--data.target_test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Images with their paths."""
        return self._eval_loader(self._evaluation_images(ImagesWithPaths, self.predict_files), "--data.predict")
