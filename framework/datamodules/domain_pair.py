"""A labelled source folder and an unlabelled target folder, paired batch by batch."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from framework.batch import DomainBatch
from framework.datamodules.base import ImageDataModule, _at_least
from framework.datamodules.datasets import ImagesWithPaths, LabelledImages, UnlabelledImages
from framework.datamodules.folders import (
    ImageFiles,
    class_names,
    labelled_images,
    stratified_split,
    unlabelled_images,
)
from framework.errors import ConfigurationError


class DomainPairDataModule(ImageDataModule):
    """Pairs a labelled source ImageFolder with an unlabelled target folder for unsupervised domain adaptation.

    A training batch is a :class:`~framework.batch.DomainBatch`; it has no target labels, whatever the target folder
    looks like. Validation has two loaders: labelled source images and unlabelled target images. Target labels are read
    in ``test`` only, from ``target_test``.

    Args:
        source: ImageFolder of the labelled domain, ``source/<class>/*``.
        target: folder of the unlabelled domain; images at any depth, class folders are not looked at.
        source_val: ImageFolder for validation; default: ``val_fraction`` of the source, each class by itself. With a
            ``val_fraction`` of 0, the training images without augmentation.
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
        source: str,
        target: str,
        *,
        source_val: str | None = None,
        target_val: str | None = None,
        target_test: str | None = None,
        predict: str | None = None,
        target_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        _at_least("--data.target_batch_size", target_batch_size, 1)
        self.source, self.target = source, target
        self.source_val, self.target_val = source_val, target_val
        self.target_test, self.predict = target_test, predict
        self.target_batch_size = target_batch_size or self.batch_size

    @property
    def class_names(self) -> list[str]:
        """The source's class folders, sorted."""
        return class_names(self.source, "--data.source")

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
        source = labelled_images(self.source, "--data.source", classes)
        target = unlabelled_images(self.target, "--data.target")
        self._check_files("--data.source", source)
        self._check_files("--data.target", target)
        if self.source_val is None:
            self.source_files, self.source_val_files = self._held_out("source", source)
        else:
            self.source_files = source
            self.source_val_files = labelled_images(self.source_val, "--data.source_val", classes)
            self._check_files("--data.source_val", self.source_val_files)
        if self.target_val is None:
            self.target_files, self.target_val_files = self._held_out("target", target)
        else:
            self.target_files = target
            self.target_val_files = unlabelled_images(self.target_val, "--data.target_val")
            self._check_files("--data.target_val", self.target_val_files)
        if self._stage == "fit":
            self._check_enough("--data.source", self.source_files, "--data.batch_size", self.batch_size)
            flag = "--data.batch_size" if self.target_batch_size == self.batch_size else "--data.target_batch_size"
            self._check_enough("--data.target", self.target_files, flag, self.target_batch_size)

    def _held_out(self, domain: str, files: ImageFiles) -> tuple[ImageFiles, ImageFiles]:
        """Training and validation part of a folder, split by the seed; the source class by class."""
        if self.val_fraction == 0:
            return files, files
        held_out, kept = stratified_split(files.labels or [0] * len(files), [self.val_fraction], self.seed)
        train, val = files.subset(kept), files.subset(held_out or kept)
        self._splits |= {f"{domain}_train": train, f"{domain}_val": val}
        return train, val

    def train_dataloader(self) -> CombinedLoader:
        """Two endless streams cut into epochs of the same length; batches are ``DomainBatch``."""
        steps = self._steps(len(self.source_files))
        source = self._train_loader(self.source_files, self.batch_size, steps, stream=0)
        target = self._train_loader(self.target_files, self.target_batch_size, steps, stream=1, labelled=False)
        return CombinedLoader(DomainBatch(source, target), "min_size")  # type: ignore[arg-type]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Labelled source images, then unlabelled target images."""
        return [
            self._eval_loader(LabelledImages(self.source_val_files, self.eval_transform), "--data.source_val"),
            self._eval_loader(UnlabelledImages(self.target_val_files, self.eval_transform), "--data.target_val"),
        ]

    def test_dataloader(self) -> DataLoader[Any]:
        """Labelled target images: the only place where target labels are read."""
        return self._eval_loader(LabelledImages(self.target_test_files, self.eval_transform), "--data.target_test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Images with their paths."""
        return self._eval_loader(ImagesWithPaths(self.predict_files, self.eval_transform), "--data.predict")
