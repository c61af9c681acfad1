"""Datasets over image files: what one sample looks like for training, evaluation and prediction."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from framework.batch import LabelledBatch, PredictionBatch, UnlabelledBatch
from framework.datamodules.folders import ImageFiles, read_image
from framework.errors import ConfigurationError


class UnlabelledImages(Dataset[Tensor]):
    """Samples are images only, uint8 ``[3, H, W]``: a label cannot leave this dataset."""

    def __init__(self, files: ImageFiles, transform: v2.Transform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return _transformed(self.files.paths[index], self.transform)


class ImagesAlone(Dataset[UnlabelledBatch]):
    """Samples are images in a batch that has no room for a label."""

    def __init__(self, files: ImageFiles, transform: v2.Transform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> UnlabelledBatch:
        return UnlabelledBatch(_transformed(self.files.paths[index], self.transform))


class LabelledImages(Dataset[LabelledBatch]):
    """Samples are images with their class index and the index of their folder, 0 where there is only one."""

    def __init__(self, files: ImageFiles, transform: v2.Transform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LabelledBatch:
        image = _transformed(self.files.paths[index], self.transform)
        label, domain = self.files.labels[index], self.files.domains[index]
        return LabelledBatch(image, label, domain)  # type: ignore[arg-type]  # collated to tensors


class ImagesWithPaths(Dataset[PredictionBatch]):
    """Samples are images with the path they came from."""

    def __init__(self, files: ImageFiles, transform: v2.Transform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> PredictionBatch:
        path = self.files.paths[index]
        return PredictionBatch(_transformed(path, self.transform), path)  # type: ignore[arg-type]  # collated to a list


def _transformed(path: str, transform: v2.Transform) -> Tensor:
    try:
        image = read_image(path)
    except Exception as error:  # Pillow raises many kinds
        raise ConfigurationError(
            f"Expected '{path}' to be an image that can be read, but got {type(error).__name__}: {error}. "
            "`--data.check_images true` finds such files before training."
        ) from error
    transformed: Tensor = transform(image)
    return transformed
