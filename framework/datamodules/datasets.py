"""Datasets over image files: what one sample looks like for training, evaluation and prediction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from framework.batch import LabelledBatch, PredictionBatch, UnlabelledBatch
from framework.datamodules.cache import CachedImages
from framework.datamodules.folders import ImageFiles, read_pixels


class Images(Dataset[Any]):
    """Base of the datasets over image files.

    Args:
        files: the images.
        transform: from the pixels of a file, uint8 ``[3, H, W]``, to an image; with ``cached`` from its pixels.
        cached: the same images, resized already; default: files are decoded whenever they are asked for.
    """

    def __init__(self, files: ImageFiles, transform: v2.Transform, cached: CachedImages | None = None) -> None:
        self.files, self.transform, self.cached = files, transform, cached

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """A whole batch, so that what is cached is copied at once."""
        return [self.sample(index, pixels) for index, pixels in zip(indices, self.pixels(indices), strict=True)]

    def pixels(self, indices: Sequence[int]) -> Iterable[Tensor]:
        """The images before the transform, uint8 ``[3, H, W]`` each; draws no random numbers."""
        if self.cached is not None:
            return self.cached.gather(indices)
        return (read_pixels(self.files.paths[index]) for index in indices)  # one after the other: they may be large

    def sample(self, index: int, pixels: Tensor) -> Any:
        """The sample ``index`` from its pixels."""
        return self._sample(index, self.transform(pixels))

    @abstractmethod
    def _sample(self, index: int, image: Tensor) -> Any: ...


class UnlabelledImages(Images):
    """Samples are images only, uint8 ``[3, H, W]``: a label cannot leave this dataset."""

    def _sample(self, index: int, image: Tensor) -> Tensor:
        return image


class ImagesAlone(Images):
    """Samples are images in a batch that has no room for a label."""

    def _sample(self, index: int, image: Tensor) -> UnlabelledBatch:
        return UnlabelledBatch(image)


class LabelledImages(Images):
    """Samples are images with their class index and the index of their folder, 0 where there is only one."""

    def _sample(self, index: int, image: Tensor) -> LabelledBatch:
        label, domain = self.files.labels[index], self.files.domains[index]
        return LabelledBatch(image, label, domain)  # type: ignore[arg-type]  # collated to tensors


class ImagesWithPaths(Images):
    """Samples are images with the path they came from."""

    def _sample(self, index: int, image: Tensor) -> PredictionBatch:
        return PredictionBatch(image, self.files.paths[index])  # type: ignore[arg-type]  # collated to a list
