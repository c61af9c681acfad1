"""How well a backbone's features tell classes apart, while it trains."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from framework.datamodules import ImageDataModule, ImageFolderDataModule
from framework.datamodules.datasets import LabelledImages
from framework.datamodules.decoding import check_images
from framework.datamodules.folders import ImageFiles
from framework.errors import ConfigurationError
from framework.inspection import epoch_is_due, undisturbed
from framework.metrics import ProbeAccuracy, ProbePart

FLAG = "--trainer.callbacks"


class OnlineProbe(L.Callback):
    """Logs ``val/linear_probe_accuracy`` and ``val/knn_accuracy`` of the features on a labelled folder.

    After the validation of every n-th epoch, and of the last, a logistic regression
    (:func:`~framework.functional.linear_probe`) and a vote of the nearest neighbours
    (:func:`~framework.functional.nearest_neighbour_scores`) learn from the folder's training images, and are measured
    on its validation images. Its test images are left alone. The images are prepared as the run's own for evaluation.

    The labels reach these two only. The module that trains reads none, and trains bit for bit as without this
    callback; but who chooses a checkpoint or an option by these values has used the labels.

    The features are those of a pre-training module's backbone, or of a classifier's bottleneck where it has one.

    Args:
        root: the labelled folder, as ``--data.root`` of ``ImageFolderDataModule``, with the same split by the same
            seed: ``root/{train,val,test}/<class>/*`` or ``root/<class>/*``.
        every_n_epochs: epochs between two measurements. The first validation is measured too, and the others show the
            last values to a checkpoint's ``monitor``, not to the loggers.
        neighbours: how many vote.
        labels_per_class: labelled training images of each class, as ``--data.labels_per_class``. Default: all.
        val_fraction: share of the training images to measure on, where there is no ``root/val``.
        name: for several probes in one run: logs ``val/<name>/…``.
    """

    def __init__(
        self,
        root: str,
        *,
        every_n_epochs: int = 1,
        neighbours: int = 20,
        labels_per_class: int | float | None = None,  # the whole number first: 1 is not 1.0
        val_fraction: float = 0.1,
        name: str | None = None,
    ) -> None:
        for option, value in (("every_n_epochs", every_n_epochs), ("neighbours", neighbours)):
            if value < 1:
                raise ConfigurationError(f"Expected `{FLAG}.{option}` to be at least 1, but got {value}.")
        self.root, self.every_n_epochs, self.neighbours, self.name = root, every_n_epochs, neighbours, name
        self.labels_per_class, self.val_fraction = labels_per_class, val_fraction
        self._values: dict[str, float] = {}

    # ------------------------------------------------------------------ before training
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the images; what is wrong with the folder ends the run before its first batch."""
        if str(getattr(stage, "value", stage)) not in ("fit", "validate"):
            return
        probes = [callback for callback in trainer.callbacks if isinstance(callback, OnlineProbe)]  # type: ignore[attr-defined]
        if any(probe is not self and probe.name == self.name for probe in probes):
            raise ConfigurationError(
                f"Expected a `{FLAG}.name` of its own for each OnlineProbe, but two have {self.name!r}."
            )
        data = trainer.datamodule  # type: ignore[attr-defined]
        folder = self._read(data.seed if isinstance(data, ImageDataModule) else None)
        folder.trainer = trainer
        # what the run does to the pixels of its own images
        self._pixels: ImageDataModule = data if isinstance(data, ImageDataModule) else folder
        self._files: dict[ProbePart, ImageFiles] = {"bank": folder.train_files, "evaluated": folder.val_files}
        for files in self._files.values():
            self._loader(files)  # enough images for all processes
            if trainer.is_global_zero and self._pixels.check_images:
                check_images(files.paths, f"{FLAG}.root")
        self._metric = ProbeAccuracy(folder.num_classes, self.neighbours)

    def _read(self, seed: int | None) -> ImageFolderDataModule:
        try:
            folder = ImageFolderDataModule(
                self.root,
                labels_per_class=self.labels_per_class,
                val_fraction=self.val_fraction,
                batch_size=1,  # there is no step that must be filled
                eval_batch_size=64,
                check_images=False,  # would look at the test images too
                num_workers=0,
                seed=seed,
            )
            folder.setup("fit")  # without a Trainer, so that it leaves no manifest of its split in the run's folder
        except ConfigurationError as error:
            raise ConfigurationError(str(error).replace("`--data.", f"`{FLAG}.")) from error
        if not set(folder.train_files.paths).isdisjoint(folder.val_files.paths):
            raise ConfigurationError(
                f"Expected `{FLAG}.root` to have a folder 'val', or classes large enough for `{FLAG}.val_fraction` = "
                f"{self.val_fraction} to hold some images out, but under '{self.root}' none is left to measure on."
            )
        return folder

    def _loader(self, files: ImageFiles) -> Any:
        return self._pixels._eval_loader(self._pixels._evaluation_images(LabelledImages, files), f"{FLAG}.root")

    # ------------------------------------------------------------------ measuring
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the features of this process's share of both parts.

        Here, after the first batch, and not at the end: an average of the weights that validation runs with is in place
        whatever the order of the callbacks, and DDP has made the processes' batch-norm statistics equal.
        """
        if batch_idx or dataloader_idx or not self._due(trainer):
            return
        self._metric.to(pl_module.device)
        with undisturbed(pl_module):
            for part, files in self._files.items():
                batches = 1 if trainer.fast_dev_run else None  # type: ignore[attr-defined]
                for images, labels, _ in islice(self._loader(files), batches):
                    images = self._pixels.normalize(images.to(pl_module.device))
                    with trainer.precision_plugin.forward_context():
                        features = _features(pl_module, images)
                    self._metric.update(features, labels.to(pl_module.device), part)

    def _due(self, trainer: L.Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        return trainer.state.fn != "fit" or not self._values or epoch_is_due(trainer, self.every_n_epochs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure with the features of all processes, and log."""
        if not self._metric.update_called:
            for name, value in self._values.items():  # a resumed run knows them from the checkpoint alone
                trainer.callback_metrics.setdefault(name, torch.tensor(value))
            return
        prefix = f"val/{self.name}/" if self.name else "val/"
        self._values = {f"{prefix}{name}": float(value) for name, value in self._metric.compute().items()}
        self._metric.reset()
        pl_module.log_dict(self._values, prog_bar=True, sync_dist=True)

    # ------------------------------------------------------------------ checkpoint
    @property
    def state_key(self) -> str:
        """Each probe of a run has a state of its own."""
        return self._generate_state_key(root=self.root, name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """The last values, for the validations of a resumed run until the next measurement."""
        return {"values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last values."""
        self._values = state_dict["values"]


def _features(module: L.LightningModule, images: Tensor) -> Tensor:
    outputs = getattr(module, "outputs", None)
    features: Tensor = module(images) if outputs is None else outputs(images).features
    return features
