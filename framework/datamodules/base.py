"""What the datamodules share: loaders of exactly resumable streams, transforms, normalisation, the split's manifest."""

from __future__ import annotations

import atexit
import csv
import hashlib
import io
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from framework.batch import DomainBatch, LabelledBatch, PredictionBatch
from framework.datamodules.datasets import ImagesWithPaths, LabelledImages, UnlabelledImages
from framework.datamodules.folders import ImageFiles, check_images, few_of_each_class
from framework.datamodules.streams import EvaluationShard, SeededDraws, StreamSampler
from framework.datamodules.transforms import (
    Crop,
    Views,
    evaluation_transform,
    training_transform,
)
from framework.errors import ConfigurationError
from framework.networks.preprocessing import Preprocessing
from framework.progress import batches_processed
from framework.reports import report
from framework.seeding import global_seed


class ImageDataModule(L.LightningDataModule):
    """Base of the datamodules on image folders.

    Images travel as uint8 and are normalised as a batch on the device. Training loaders serve endless streams whose
    position is the run's batch counter, which travels in the checkpoint: a resumed run continues bit for bit.

    Args:
        batch_size: images per step, rank and domain.
        eval_batch_size: images per evaluation step and rank; default: twice ``batch_size``.
        steps_per_epoch: batches in an epoch; default: as many as the (source) training images fill.
        val_fraction: share of the training images held out for validation where no validation folder is given.
        labels_per_class: labelled (source) training images of each class and folder, as a whole number or as a share of
            them (``1`` is one image, ``1.0`` all; at least one), chosen by the seed after validation and test are split
            off, so that a larger number has those of a smaller one too; the others are not used. Default: all.
        image_size: height and width that the network sees, in pixels; default: what the model's backbone expects, which
            is known when the Trainer runs, and of a trained model what it was trained with. Without a Trainer, or with
            a model that does not say: 224, and ImageNet's statistics.
        resize_size: square that images are resized to before a crop; default: ``image_size * 256 / 224``.
        crop: training crop, ``random_resized``, ``pad``, ``center`` or ``none``.
        horizontal_flip: mirror half of the training images.
        mean, std: per-channel statistics of the normalisation, for images in [0, 1]; default: as ``image_size``.
        check_images: decode every file once before training, so that a corrupt one ends the run at its start.
        num_workers: loader processes per domain.
        seed: seed of splits, order and augmentation; default: the seed of ``seed_everything``.
    """

    views = 1
    """How many views of each training image a batch holds."""

    def __init__(
        self,
        *,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        val_fraction: float = 0.1,
        labels_per_class: int | float | None = None,  # the whole number first: 1 is not 1.0
        image_size: int | None = None,
        resize_size: int | None = None,
        crop: Crop = "random_resized",
        horizontal_flip: bool = True,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        check_images: bool = True,
        num_workers: int = 2,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        _at_least("--data.batch_size", batch_size, 1)
        _at_least("--data.eval_batch_size", eval_batch_size, 1)
        _at_least("--data.steps_per_epoch", steps_per_epoch, 1)
        _at_least("--data.image_size", image_size, 1)
        _at_least("--data.num_workers", num_workers, 0)
        _fraction("--data.val_fraction", val_fraction)
        _amount("--data.labels_per_class", labels_per_class)
        if resize_size is not None and image_size is not None:
            _check_resize(resize_size, image_size)
        for flag, values in (("--data.mean", mean), ("--data.std", std)):
            if values is None:
                continue
            if len(values) != 3 or (flag == "--data.std" and min(values) <= 0):
                raise ConfigurationError(f"Expected `{flag}` to be three numbers (std above 0), but got {values}.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.steps_per_epoch = steps_per_epoch
        self.val_fraction = val_fraction
        self.labels_per_class = labels_per_class
        training_transform(1, 1, crop, horizontal_flip)  # a crop that there is not
        self.crop, self.horizontal_flip = crop, horizontal_flip
        self._given: dict[str, Any] = {
            "image_size": image_size,
            "mean": None if mean is None else tuple(mean),
            "std": None if std is None else tuple(std),
        }
        self._resize_size = resize_size
        self._restored_preprocessing: Preprocessing | None = None
        self._announced: Preprocessing | None = None
        self.check_images = check_images
        self.num_workers = num_workers
        self.seed = global_seed() if seed is None else seed
        self._restored_batches = 0
        self._splits: dict[str, ImageFiles] = {}
        self._used: dict[str, ImageFiles] = {}
        self._columns: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    # ------------------------------------------------------------------ what a subclass says
    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their indices; needs no ``setup``."""
        raise AttributeError("class_names")

    @property
    def num_classes(self) -> int:
        """Number of classes; the command line hands it to the model."""
        return len(self.class_names)

    def _scan(self, stage: str) -> None:
        """Find the files of a stage (``fit``, ``validate``, ``test``, ``predict``) and check them."""
        raise AttributeError("_scan")

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
        _check_resize(self._resize_size, self.image_size)
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
        """From the pixels of a file to a training image, both uint8."""
        return training_transform(self.image_size, self.resize_size, self.crop, self.horizontal_flip)

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

    # ------------------------------------------------------------------ before training
    def prepare_data(self) -> None:
        """Check the folders before anything is built or written: a user's mistake leaves no trace."""
        self._scan(self._stage)

    def setup(self, stage: str) -> None:
        """Find the files; in ``fit`` write the split, if there is one, beside the logs."""
        stage = str(getattr(stage, "value", stage))
        self._restored_batches = 0  # a checkpoint is restored after setup
        self._splits, self._used = {}, {}
        self._scan(stage)
        if stage == "fit" and self._splits and self.trainer is not None and self.trainer.loggers:
            self._write_manifest(self.trainer.log_dir)

    @property
    def _stage(self) -> str:
        function = None if self.trainer is None else self.trainer.state.fn
        return "fit" if function is None else str(function.value)

    # without a trainer (in a notebook, say) the loaders are those of one process at the start of a run
    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _check_files(self, flag: str, files: ImageFiles) -> None:
        if not self.check_images or self._stage != "fit" or self._rank != 0:
            return
        key = (flag, tuple(files.paths))
        if key in (checked := self.__dict__.setdefault("_checked", set())):  # once, not in setup again
            return
        if len(files) > 20_000:
            rank_zero_info(f"Checking the {len(files):,} images of `{flag}` (`--data.check_images false` skips this) …")
        check_images(files.paths, flag)
        checked.add(key)

    def _check_enough(self, flag: str, files: ImageFiles, batch_flag: str, batch_size: int) -> None:
        share = batch_size // len(files.roots)
        ranks = f" on each of {self._world_size} processes" if self._world_size > 1 else ""
        if len(files.roots) == 1:
            expected = f"`{flag}` to hold at least one batch, `{batch_flag}` = {batch_size} images{ranks}"
        else:
            expected = (
                f"every folder of `{flag}` to hold its share of a batch, {share} of `{batch_flag}` = {batch_size} "
                f"images{ranks}"
            )
        for domain, root in enumerate(files.roots):
            if (count := files.domains.count(domain)) < share * self._world_size:
                raise ConfigurationError(
                    f"Expected {expected}, but {count} training images are under '{root}'. Lower `{batch_flag}`"
                    + self._or_else(flag)
                )

    def _or_else(self, flag: str) -> str:
        if self.labels_per_class is not None and flag != "--data.target":
            return " or raise `--data.labels_per_class`."
        return " or `--data.val_fraction`." if self.val_fraction else "."

    def _with_few_labels(self, train: ImageFiles, val: ImageFiles, of: str = "") -> tuple[ImageFiles, ImageFiles]:
        """What ``labels_per_class`` leaves of the training images, and of validation where that is on them too."""
        if self.labels_per_class is None:
            return train, val
        chosen, others = few_of_each_class(train, self.labels_per_class, self.seed, "--data.labels_per_class")
        unused = train.subset(others)
        left_out = set(unused.paths)
        few, val = train.subset(chosen), val.subset([i for i in range(len(val)) if val.paths[i] not in left_out])
        self._splits.setdefault(f"{of}train", train)  # where nothing is split off too: a resumed run chooses from it
        self._used |= {f"{of}train": few, f"{of}unused": unused}
        if f"{of}val" in self._splits:
            self._used[f"{of}val"] = val
        return few, val

    # ------------------------------------------------------------------ the split's manifest
    def _split_table(self, labelled: bool = False) -> str:
        """The splits, or with ``labelled`` what is used of them: a run with more labels has the same splits."""
        splits = self._splits | self._used if labelled else self._splits
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        several = any(len(files.roots) > 1 for files in splits.values())  # where a file's name may be there twice
        writer.writerow(["split", "folder", "file"] if several else ["split", "file"])
        for name, files in splits.items():
            folders = [str(root.resolve()) for root in files.roots]
            # by folder, so that the order in which the folders are given makes no other split
            for domain, path in sorted(zip(files.domains, files.paths, strict=True), key=lambda row: folders[row[0]]):
                file = Path(path).relative_to(files.roots[domain]).as_posix()
                writer.writerow([name, folders[domain], file] if several else [name, file])
        return rows.getvalue()

    def _write_manifest(self, folder: str | None) -> None:
        if folder is None or not self.trainer.is_global_zero:  # type: ignore[union-attr]
            return
        path = Path(folder) / "split.csv"
        if not path.exists():  # a resumed run has it already, and load_state_dict compares
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._split_table(labelled=True), encoding="utf-8")

    def _split_identity(self) -> dict[str, str]:
        roots = sorted({str(root.resolve()) for files in self._splits.values() for root in files.roots})
        return {"roots": "\n".join(roots), "digest": hashlib.sha256(self._split_table().encode()).hexdigest()}

    # ------------------------------------------------------------------ checkpoint
    def _processed(self) -> int:
        """The run's batch counter; the loops' own is restored later than the datamodule's."""
        return max(self._restored_batches, 0 if self.trainer is None else batches_processed(self.trainer))

    def state_dict(self) -> dict[str, Any]:
        """The position of the streams, and what must be equal for the position to mean the same."""
        return {
            "batches": self._processed(),
            "seed": self.seed,
            "images_per_step": self.batch_size * self._world_size,
            "split": self._split_identity(),
            "preprocessing": self.preprocessing.plain(),
            "labels_per_class": self.labels_per_class,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position.

        Raises:
            ConfigurationError: the run has another seed, or the folder's split is no longer the same.
        """
        if "preprocessing" in state:  # for use without a module; older checkpoints have none
            self._restored_preprocessing = Preprocessing.of(state["preprocessing"], "the checkpoint")
        if self._stage == "fit" and state["seed"] != self.seed:
            raise ConfigurationError(
                f"Expected `--seed_everything {state['seed']}`, the seed of the checkpoint's run, but got {self.seed}: "
                "the data would come in another order."
            )
        before, now = ("null" if n is None else repr(n) for n in (state.get("labels_per_class"), self.labels_per_class))
        if self._stage == "fit" and before != now:  # 1 is not 1.0
            raise ConfigurationError(
                f"Expected `--data.labels_per_class {before}`, as in the run of the checkpoint, but got {now}: it "
                "would go on with other training images."
            )
        split = self._split_identity()
        if split["roots"] == state["split"]["roots"] and split["digest"] != state["split"]["digest"]:
            folders = split["roots"].replace("\n", "' and '")
            raise ConfigurationError(
                "Expected the split of the run that the checkpoint belongs to, but the files below "
                f"'{folders}', `--data.val_fraction` or `--seed_everything` have changed since: images that it "
                "trained on would be tested. Restore them, or give separate folders."
            )
        if self._stage != "fit":
            return
        if state["images_per_step"] != self.batch_size * self._world_size:
            rank_zero_warn(
                f"The checkpoint's run took {state['images_per_step']} images a step, this one takes "
                f"{self.batch_size * self._world_size}: it continues, but not as the uninterrupted run would."
            )
        self._restored_batches = state["batches"]

    # ------------------------------------------------------------------ loaders
    def _steps(self, images: int) -> int:
        """Batches in an epoch; not more than a ``limit_train_batches`` that is a number, so that none is prefetched in
        vain. (A fraction is taken of what is returned here.)"""
        steps = self.steps_per_epoch or max(1, images // (self.batch_size * self._world_size))
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        return min(steps, limit) if isinstance(limit, int) else steps

    def _train_loader(
        self, files: ImageFiles, batch_size: int, steps: int, stream: int = 0, labelled: bool = True
    ) -> DataLoader[Any]:
        """Endless stream number ``stream`` of the run: every stream has an order and augmentations of its own."""
        self._announce()
        seed = 16 * self.seed + stream
        sampler = StreamSampler(files.domains, batch_size, steps, seed, self._rank, self._world_size, self._processed)
        transform = self.train_transform if self.views == 1 else Views(self.train_transform, self.views)
        images: Dataset[Any] = (LabelledImages if labelled else UnlabelledImages)(files, transform)
        return DataLoader(
            SeededDraws(images, seed),
            batch_size=batch_size,
            sampler=sampler,
            drop_last=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=leave_stopping_to_the_run,
        )

    def _eval_loader(self, dataset: LabelledImages | UnlabelledImages | ImagesWithPaths, flag: str) -> DataLoader[Any]:
        if len(dataset) < self._world_size:
            raise ConfigurationError(
                f"Expected `{flag}` to hold an image for each of {self._world_size} processes, but found "
                f"{len(dataset)}. Lower `--trainer.devices`."
            )
        self._announce()
        return DataLoader(
            dataset,
            batch_size=self.eval_batch_size,
            sampler=EvaluationShard(len(dataset), self._rank, self._world_size),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else iterating draws from the run's generator
            worker_init_fn=leave_stopping_to_the_run,
        )

    # ------------------------------------------------------------------ pixels
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise the images of a batch on its device."""
        if isinstance(batch, DomainBatch):
            source = batch.source._replace(images=self.normalize(batch.source.images))
            return DomainBatch(source, self.normalize(batch.target))
        if isinstance(batch, LabelledBatch | PredictionBatch):
            return batch._replace(images=self.normalize(batch.images))
        return self.normalize(batch)

    def _statistics(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        _, mean, std = self.preprocessing
        key = (device, dtype, mean, std)
        if key not in self._columns:  # once: a copy to the device makes the host wait
            with torch.inference_mode(False):
                columns = torch.tensor([mean, std], dtype=dtype, device=device).view(2, 3, 1, 1)
            self._columns[key] = (columns[0], columns[1])
        return self._columns[key]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 ``[N, 3, H, W]`` to floats of the model's precision with the given mean and standard deviation."""
        module = None if self.trainer is None else self.trainer.lightning_module
        dtype = torch.float32 if module is None else module.dtype
        mean, std = self._statistics(images.device, dtype)  # type: ignore[arg-type]
        return (images.to(dtype) / 255 - mean) / std

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`, clipped to [0, 1], for showing images."""
        mean, std = self._statistics(images.device, images.dtype)
        return (images * std + mean).clamp(0, 1)


def leave_stopping_to_the_run(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a loader's worker: terminals and schedulers send them to every process of the run,
    which would lose its workers before it has finished the batch and saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    # multiprocessing ends what is left with SIGTERM and waits for it: for ever, since the workers above ignore that.
    # There are some left where a run has ended in an error.
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _check_resize(resize_size: int, image_size: int) -> None:
    if resize_size < image_size:
        raise ConfigurationError(
            f"Expected `--data.resize_size` to be at least `--data.image_size` = {image_size}, but got {resize_size}."
        )


def _at_least(flag: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigurationError(f"Expected `{flag}` to be at least {least}, but got {value}.")


def _amount(flag: str, value: int | float | None) -> None:
    fits = value is None or (value >= 1 if isinstance(value, int) else 0 < value <= 1)
    if not fits or isinstance(value, bool):
        raise ConfigurationError(
            f"Expected `{flag}` to be a whole number from 1 on, or a share above 0 and up to 1.0, but got {value}."
        )


def _fraction(flag: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigurationError(f"Expected `{flag}` to be in [0, 1), but got {value}.")
