"""What the network sees: size, augmentation and normalisation of the images, as every datamodule has them."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import Tensor
from torchvision.transforms import v2

from framework.batch import DomainBatch, LabelledBatch, PredictionBatch, UnlabelledBatch
from framework.datamodules.augmentation import Crop, TrainingTransform
from framework.datamodules.checks import (
    check_at_least,
    check_augment_on,
    check_augmentation,
    check_resize,
    check_statistics,
)
from framework.datamodules.datasets import PlannedViews
from framework.datamodules.device_augmentation import DeviceAugmentation
from framework.datamodules.normalization import Normalization, takes_channels_last
from framework.datamodules.transforms import evaluation_transform, training_transform
from framework.networks.preprocessing import Preprocessing
from framework.reports import report

Place = Literal["loader", "device"]


class PixelDataModule(L.LightningDataModule):
    """The part of a datamodule that deals with pixels; the options are those of
    :class:`~framework.datamodules.base.ImageDataModule`."""

    def __init__(
        self,
        *,
        image_size: int | None,
        resize_size: int | None,
        views: int,
        crop: Crop,
        crop_scale: tuple[float, float],
        horizontal_flip: bool,
        color_jitter: float,
        grayscale: float,
        blur: float,
        mean: tuple[float, float, float] | None,
        std: tuple[float, float, float] | None,
        augment_on: Place,
    ) -> None:
        super().__init__()
        check_at_least("--data.image_size", image_size, 1)
        if resize_size is not None and image_size is not None:
            check_resize(resize_size, image_size)
        check_at_least("--data.views", views, 1)
        check_augmentation(crop_scale, color_jitter, grayscale, blur)
        check_statistics(mean, std)
        check_augment_on(augment_on)
        training_transform(1, 1, crop, horizontal_flip)  # a crop that there is not
        self.views = views
        self.crop, self.horizontal_flip = crop, horizontal_flip
        self.crop_scale = (crop_scale[0], crop_scale[1])
        self.color_jitter, self.grayscale, self.blur = color_jitter, grayscale, blur
        self.augment_on = augment_on
        self._given: dict[str, Any] = {
            "image_size": image_size,
            "mean": None if mean is None else tuple(mean),
            "std": None if std is None else tuple(std),
        }
        self._resize_size = resize_size
        self._restored_preprocessing: Preprocessing | None = None
        self._announced: Preprocessing | None = None
        self._normalization = Normalization()
        self._device_augmentation: DeviceAugmentation | None = None

    # ------------------------------------------------------------------ what the network sees
    @property
    def preprocessing(self) -> Preprocessing:
        """Image size and normalisation: what was given, else what the Trainer's module expects.

        Looked up every time: a checkpoint, which may tell the module, is restored after ``setup``.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        expected = getattr(module, "preprocessing", None)
        if not isinstance(expected, Preprocessing):  # a module of the user's own
            expected = self._restored_preprocessing or Preprocessing()
        return expected._replace(**{name: value for name, value in self._given.items() if value is not None})

    @property
    def image_size(self) -> int:
        """Height and width that the network sees, in pixels."""
        return self.preprocessing.image_size

    @property
    def resize_size(self) -> int:
        """The square that images are resized to before a crop, in pixels."""
        if self._resize_size is None:
            return round(self.image_size * 256 / 224)
        check_resize(self._resize_size, self.image_size)
        return self._resize_size

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of the three channels, for images in [0, 1]."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of the three channels, for images in [0, 1]."""
        return self.preprocessing.std

    @property
    def train_transform(self) -> v2.Transform:
        """From the pixels of a file, uint8 ``[3, H, W]``, to a training image, uint8 ``[3, image_size, image_size]``.

        It draws from torch's generator. What a loader makes of a draw it gives with the draw's seed, that of
        :meth:`SeededDraws.seed_of <framework.datamodules.streams.SeededDraws.seed_of>`.
        """
        return self._train_transform()

    def _train_transform(self, resized: bool = False) -> TrainingTransform:
        return training_transform(
            self.image_size,
            self.resize_size,
            self.crop,
            self.horizontal_flip,
            resized=resized,
            crop_scale=self.crop_scale,
            color_jitter=self.color_jitter,
            grayscale=self.grayscale,
            blur=self.blur,
        )

    @property
    def eval_transform(self) -> v2.Transform:
        """From the pixels of a file to an image for evaluation, both uint8."""
        return evaluation_transform(self.image_size, self.resize_size, self.crop)

    def _announce(self) -> None:
        """Say once what was not given, where a run is about to use it."""
        missing = [name for name, value in self._given.items() if value is None]
        if self.trainer is None or not missing or self._announced == self.preprocessing:
            return
        self._announced = self.preprocessing
        values = ", ".join(f"`--data.{name}` {getattr(self, name)}" for name in missing)
        report(f"Images as the backbone expects them: {values}.")

    # ------------------------------------------------------------------ on the device
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As Lightning does, but on a CPU, where what loaders make is already."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise the images of a batch on its device, and make the views that a loader has only planned."""
        if isinstance(batch, DomainBatch):
            source = batch.source._replace(images=self._prepared(batch.source.images))
            return DomainBatch(source, self._prepared(batch.target))
        if isinstance(batch, LabelledBatch | UnlabelledBatch | PredictionBatch):
            return batch._replace(images=self._prepared(batch.images))
        return self._prepared(batch)

    def _prepared(self, images: Tensor | PlannedViews) -> Tensor:
        if isinstance(images, PlannedViews):
            augmentation = self._train_transform().augmentation
            if self._device_augmentation is None or self._device_augmentation.augmentation != augmentation:
                self._device_augmentation = DeviceAugmentation(augmentation)
            images = self._device_augmentation(images)
        return self.normalize(images)

    def normalize(self, images: Tensor) -> Tensor:
        """Images with the given mean and standard deviation, in the precision of the model.

        Args:
            images: ``[..., 3, H, W]``, from 0 to 255.

        Returns:
            Floats. In memory they have their channels innermost if the images have, and the model's weights.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        dtype = torch.float32 if module is None else module.dtype
        _, mean, std = self.preprocessing
        return self._normalization.apply(images, mean, std, dtype, takes_channels_last(module))  # type: ignore[arg-type]

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`, clipped to [0, 1], for showing images."""
        _, mean, std = self.preprocessing
        return self._normalization.invert(images, mean, std)
