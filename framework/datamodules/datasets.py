"""Datasets over image files: what a batch looks like for training, evaluation and prediction."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2

from framework.batch import LabelledBatch, PredictionBatch, UnlabelledBatch
from framework.datamodules.augmentation import TrainingTransform, View, uniform_numbers
from framework.datamodules.cache import CachedImages
from framework.datamodules.decoding import read_pixels
from framework.datamodules.folders import ImageFiles

T = TypeVar("T")


class PlannedViews(NamedTuple):
    """Resized images with the views that are to be made of them, on the device: what is in a batch in place of images.

    Attributes:
        images: uint8, ``[N, 3, side, side]``.
        plans: a :class:`~framework.datamodules.augmentation.View` in each row, ``[N, views, 12]``: float32 numbers, but
            their bits as int32, since a Trainer rounds floats to the precision of the model on their way.
    """

    images: Tensor
    plans: Tensor


class Images(Dataset[Any]):
    """Base of the datasets over image files. They make whole batches: loaders take :func:`whole` to collate.

    Args:
        files: the images.
        transform: from the pixels of a file, uint8 ``[3, H, W]``, to an image; with ``cached`` from its pixels, which
            it must not write to.
        cached: the same images, resized already; default: files are decoded whenever they are asked for.
        views: how many views of each image, with a training transform; above 1 images are ``[N, views, 3, H, W]``.
        planned: serve :class:`PlannedViews` instead of making the views, with a training transform.
    """

    def __init__(
        self,
        files: ImageFiles,
        transform: v2.Transform,
        cached: CachedImages | None = None,
        views: int = 1,
        planned: bool = False,
    ) -> None:
        self.files, self.transform, self.cached = files, transform, cached
        self.views, self.planned = views, planned

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        """One sample, as it is in a batch."""
        return first(self.batch([index]))

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch."""
        return self.batch(indices)

    def batch(self, indices: Sequence[int], seeds: Sequence[int] | None = None) -> Any:
        """A batch.

        Args:
            indices: of its images.
            seeds: of the random numbers of each image; default: they come from the run's generators.
        """
        return self._batch(indices, self._images(indices, seeds))

    @abstractmethod
    def _batch(self, indices: Sequence[int], images: Any) -> Any: ...

    def _pixels(self, index: int) -> Tensor:
        return read_pixels(self.files.paths[index]) if self.cached is None else self.cached.view(index)

    def _images(self, indices: Sequence[int], seeds: Sequence[int] | None) -> Tensor | PlannedViews:
        transform = self.transform
        if not isinstance(transform, TrainingTransform):
            return self._transformed(indices, seeds)
        if seeds is None:
            seeds = torch.randint(1 << 62, (len(indices),)).tolist()
        size, side = transform.augmentation.image_size, transform.augmentation.side
        views = transform.augmentation.views(uniform_numbers(seeds, self.views).flatten(0, 1))
        if self.planned:
            images = _empty(len(indices), side, side)
            for row, index in zip(images, indices, strict=True):
                row.copy_(transform.resize(self._pixels(index)))
            return PlannedViews(images, views.float().view(torch.int32).view(len(indices), self.views, -1))
        images = _empty(len(views), size, size)
        places = zip(torch.split(images, 1), views.tolist(), strict=True)
        for index in indices:
            resized = transform.resize(self._pixels(index))
            for place, view in islice(places, self.views):
                transform.put_view(resized, View(*view), place)
        return images if self.views == 1 else images.view(len(indices), self.views, *images.shape[1:])

    def _transformed(self, indices: Sequence[int], seeds: Sequence[int] | None) -> Tensor:
        images = None
        for i, index in enumerate(indices):
            with seeded(None if seeds is None else seeds[i]):
                image = self.transform(self._pixels(index))
            if images is None:
                images = _empty(len(indices), *image.shape[-2:])
            images[i] = image
        assert images is not None, "a batch without images"
        return images


class UnlabelledImages(Images):
    """Batches are images only, uint8 ``[N, 3, H, W]``: a label cannot leave this dataset."""

    def _batch(self, indices: Sequence[int], images: Any) -> Any:
        return images


class ImagesAlone(Images):
    """Batches are images in a tuple that has no room for a label."""

    def _batch(self, indices: Sequence[int], images: Any) -> UnlabelledBatch:
        return UnlabelledBatch(images)


class LabelledImages(Images):
    """Batches are images with their class index and the index of their folder, 0 where there is only one."""

    def _batch(self, indices: Sequence[int], images: Any) -> LabelledBatch:
        labels = torch.tensor([self.files.labels[index] for index in indices])
        return LabelledBatch(images, labels, torch.tensor([self.files.domains[index] for index in indices]))


class ImagesWithPaths(Images):
    """Batches are images with the paths they came from."""

    def _batch(self, indices: Sequence[int], images: Any) -> PredictionBatch:
        return PredictionBatch(images, [self.files.paths[index] for index in indices])


def first(batch: Any) -> Any:
    """The first sample of a batch."""
    return batch._make(map(first, batch)) if isinstance(batch, tuple) else batch[0]  # type: ignore[attr-defined]


def whole(batch: T) -> T:
    """What a loader does to collate batches that are whole already: nothing."""
    return batch


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Set the generators that any transform may draw from, and afterwards back to where they were; None: do nothing."""
    if seed is None:
        yield
        return
    # the generator itself: torch.manual_seed costs a hundred times more on a CUDA build without a GPU
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        yield
    finally:  # without workers these are the run's own generators
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _empty(count: int, height: int, width: int) -> Tensor:
    """Room for a batch, uint8 ``[count, 3, height, width]`` with the channels innermost; in a worker process in shared
    memory, from which the run takes it without a copy."""
    shape = count, height, width, 3
    if get_worker_info() is None:
        images = torch.empty(shape, dtype=torch.uint8)
    else:  # as torch's own collation does
        storage = torch.UntypedStorage._new_shared(count * height * width * 3)  # type: ignore[no-untyped-call]
        images = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    return images.permute(0, 3, 1, 2)
