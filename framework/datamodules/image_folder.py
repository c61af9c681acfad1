"""One labelled folder: training, validation and test of a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from framework.batch import LabelledBatch
from framework.datamodules.base import ImageDataModule
from framework.datamodules.checks import check_fraction
from framework.datamodules.datasets import ImagesWithPaths, LabelledImages
from framework.datamodules.folders import (
    ImageFiles,
    class_names,
    labelled_images,
    stratified_split,
    subfolders,
    unlabelled_images,
)
from framework.errors import ConfigurationError

PARTS = ("train", "training", "val", "valid", "validation", "test", "testing")  # names of parts, hardly of classes


class ImageFolderDataModule(ImageDataModule):
    """Labelled images of one domain, from ``root/{train,val,test}/<class>/*`` or from one folder ``root/<class>/*``.

    Where ``root/train`` exists, ``root/val`` and ``root/test`` are used if they are there, and validation images are
    split off the training images if ``root/val`` is not. One folder is split by the seed, each class by itself, and
    the split is written to ``split.csv`` in the run's folder.

    Args:
        root: the folder.
        test_fraction: share of one folder held out for ``test``.
        predict: folder of images for ``predict``; default: the test images.
        options: those of :class:`~framework.datamodules.base.ImageDataModule`.
    """

    batch_type: ClassVar[type] = LabelledBatch

    def __init__(
        self,
        root: str,
        *,
        test_fraction: float = 0.2,
        predict: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_fraction("--data.test_fraction", test_fraction)
        if test_fraction + self.val_fraction >= 1:
            raise ConfigurationError(
                "Expected `--data.test_fraction` and `--data.val_fraction` to leave images for training, but they "
                f"are {test_fraction} and {self.val_fraction}."
            )
        self.root, self.test_fraction, self.predict = root, test_fraction, predict

    def _part(self, name: str) -> Path | None:
        part = Path(self.root).expanduser() / name
        # without folders in it, it is a class of that name: VisDA-2017 has a class "train"
        return part if part.is_dir() and subfolders(part, "--data.root") else None

    @property
    def class_names(self) -> list[str]:
        """The class folders, sorted."""
        train = self._part("train")
        names = class_names(train or self.root, "--data.root")
        if train is None and all(name.lower() in PARTS for name in names):
            raise ConfigurationError(
                f"Expected `--data.root` to hold folders train, val and test with class folders in them, or class "
                f"folders, but '{self.root}' holds {', '.join(repr(name) for name in names)}, and no 'train' with "
                "class folders. Rename them, or give one of them as `--data.root`."
            )
        return names

    def _scan(self, stage: str) -> None:
        if stage == "predict" and self.predict is not None:
            self.predict_files = unlabelled_images(self.predict, "--data.predict")
            return
        classes = self.class_names
        if self._part("train") is None:
            self._split_one_folder(classes)
        else:
            self._read_parts(stage, classes)
        if stage == "test" and not self.test_files:
            raise ConfigurationError(
                f"Expected a folder 'test' under `--data.root` '{self.root}' or a `--data.test_fraction` above 0, but "
                "found neither: `test` has no images."
            )
        if stage == "predict":
            self.predict_files = self.test_files or self.val_files
        if stage == "fit":
            self._check_enough("--data.root", self.train_files, "--data.batch_size", self.batch_size)

    def _split_one_folder(self, classes: list[str]) -> None:
        files = self._labelled(Path(self.root), classes)
        test, val, train = stratified_split(files.labels, [self.test_fraction, self.val_fraction], self.seed)
        self.train_files, self.test_files = files.subset(train), files.subset(test)
        self.val_files = files.subset(val or train)
        self._splits = {"train": self.train_files, "val": self.val_files, "test": self.test_files}
        self.train_files, self.val_files = self._with_few_labels(self.train_files, self.val_files)

    def _read_parts(self, stage: str, classes: list[str]) -> None:
        train_folder, val_folder, test_folder = self._part("train"), self._part("val"), self._part("test")
        assert train_folder is not None
        self.test_files = ImageFiles([train_folder], [], [], classes, [])
        if test_folder is not None:
            self.test_files = self._labelled(test_folder, classes)
        if stage == "test" or (stage == "predict" and self.test_files):
            return  # the training images may have gone since
        train = self._labelled(train_folder, classes)
        if val_folder is not None:
            self.train_files, self.val_files = train, self._labelled(val_folder, classes)
        else:
            val, kept = stratified_split(train.labels, [self.val_fraction], self.seed)
            self.train_files, self.val_files = train.subset(kept), train.subset(val or kept)
            self._splits = {"train": self.train_files, "val": self.val_files}
        self.train_files, self.val_files = self._with_few_labels(self.train_files, self.val_files)

    def _labelled(self, folder: Path, classes: list[str]) -> ImageFiles:
        files = labelled_images(folder, "--data.root", classes)
        self._check_files("--data.root", files)
        return files

    def train_dataloader(self) -> DataLoader[Any]:
        """An endless stream of labelled images cut into epochs."""
        return self._train_loader(self.train_files, self.batch_size, self._steps(len(self.train_files)))

    def unaugmented_train_dataloader(self) -> DataLoader[Any]:
        """All labelled training images as evaluation sees them, each once over all processes, in a fixed order."""
        return self._eval_loader(self._evaluation_images(LabelledImages, self.train_files), "--data.root")

    def val_dataloader(self) -> DataLoader[Any]:
        """Labelled validation images."""
        return self._eval_loader(self._evaluation_images(LabelledImages, self.val_files), "--data.root")

    def test_dataloader(self) -> DataLoader[Any]:
        """Labelled test images."""
        return self._eval_loader(self._evaluation_images(LabelledImages, self.test_files), "--data.root")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Images with their paths."""
        return self._eval_loader(self._evaluation_images(ImagesWithPaths, self.predict_files), "--data.predict")
