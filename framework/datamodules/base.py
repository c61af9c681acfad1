"""What the datamodules share: loaders of exactly resumable streams, caches, splits and their manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from framework.datamodules.augmentation import AREAS, Crop, TrainingTransform
from framework.datamodules.cache import CachedImages, ImageCache, Storage
from framework.datamodules.checks import check_amount, check_at_least, check_cache, check_fraction, check_workers
from framework.datamodules.datasets import Images, LabelledImages, whole
from framework.datamodules.decoding import check_images
from framework.datamodules.folders import ImageFiles, few_of_each_class, joined, stratified_split
from framework.datamodules.pixels import PixelDataModule, Place
from framework.datamodules.split_manifest import split_identity, split_table, write_manifest
from framework.datamodules.streams import EvaluationShard, SeededDraws, StreamSampler
from framework.datamodules.transforms import evaluation_transform, resized_side
from framework.datamodules.workers import Workers, image_loader
from framework.errors import ConfigurationError
from framework.networks.preprocessing import Preprocessing
from framework.progress import batches_processed
from framework.seeding import global_seed


class ImageDataModule(PixelDataModule):
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
        views: how many random views of each training image a batch holds, for the methods that compare them; above 1
            the images of a training batch are ``[N, views, 3, H, W]``.
        crop: training crop, ``random_resized``, ``pad``, ``center`` or ``none``.
        crop_scale: the least and the largest area of a ``random_resized`` crop, as shares of the image.
        horizontal_flip: mirror half of the training images.
        color_jitter: strength of random changes of brightness, contrast, saturation and hue of training images; 0 for
            none, 1 as SimCLR on ImageNet, 0.5 on small images.
        grayscale: probability of taking the colours out of a training image.
        blur: probability of blurring a training image.
        mean, std: per-channel statistics of the normalisation, for images in [0, 1]; default: as ``image_size``.
        check_images: decode every file once before training, so that a corrupt one ends the run at its start.
        augment_on: where random views of training images are made: by the ``loader``, image by image, or on the
            ``device``, a batch at once, for an accelerator that waits for few cores. The views are the same but for
            rounding; those of validation are always the loader's.
        cache: decode each image of a folder once, resized for the crop, and keep the pixels in ``memory``, or on
            ``disk`` for later runs too; batches are the same ones, bit for bit. Processes of one machine share them.
        cache_dir: folder for ``disk``, of which anything may be deleted at any time; default: ``transfer-framework`` in
            the user's folder of caches (``$XDG_CACHE_HOME`` or ``~/.cache``).
        num_workers: workers per domain that make batches ahead of the run; they change no batch.
        workers: ``threads`` or ``processes``; default: threads where images come from a cache, from which a crop costs
            less than handing it from process to process, and processes where images are decoded.
        seed: seed of splits, order and augmentation; default: the seed of ``seed_everything``.
    """

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
        views: int = 1,
        crop: Crop = "random_resized",
        crop_scale: tuple[float, float] = AREAS,
        horizontal_flip: bool = True,
        color_jitter: float = 0.0,
        grayscale: float = 0.0,
        blur: float = 0.0,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        augment_on: Place = "loader",
        check_images: bool = True,
        cache: Storage = "none",
        cache_dir: str | None = None,
        num_workers: int = 2,
        workers: Workers | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size,
            resize_size=resize_size,
            views=views,
            crop=crop,
            crop_scale=crop_scale,
            horizontal_flip=horizontal_flip,
            color_jitter=color_jitter,
            grayscale=grayscale,
            blur=blur,
            mean=mean,
            std=std,
            augment_on=augment_on,
        )
        self.save_hyperparameters(logger=False)
        check_at_least("--data.batch_size", batch_size, 1)
        check_at_least("--data.eval_batch_size", eval_batch_size, 1)
        check_at_least("--data.steps_per_epoch", steps_per_epoch, 1)
        check_at_least("--data.num_workers", num_workers, 0)
        check_cache(cache)
        check_workers(workers)
        check_fraction("--data.val_fraction", val_fraction)
        check_amount("--data.labels_per_class", labels_per_class)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.steps_per_epoch = steps_per_epoch
        self.val_fraction = val_fraction
        self.labels_per_class = labels_per_class
        self.check_images = check_images
        self.cache, self.cache_dir = cache, cache_dir
        self._caches: dict[tuple[Any, ...], ImageCache] = {}
        self.num_workers = num_workers
        self.workers: Workers = workers or ("processes" if cache == "none" else "threads")
        self.seed = global_seed() if seed is None else seed
        self._restored_batches = 0
        self._splits: dict[str, ImageFiles] = {}
        self._used: dict[str, ImageFiles] = {}

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
            folder = self.trainer.log_dir
            if folder is not None and self.trainer.is_global_zero:
                write_manifest(folder, self._split_table(labelled=True))

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
        if self.cache != "none" and all(
            ImageCache.exists(paths, self._resized_side, self.cache, self.cache_dir) for paths in files.folders
        ):
            return  # each of them has been decoded
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

    def _held_out(self, folders: Sequence[ImageFiles], of: str = "") -> tuple[ImageFiles, ImageFiles]:
        """Training and validation part of each folder, split by the seed; with labels class by class."""
        if self.val_fraction == 0:
            return joined(folders), joined(folders)
        trains, vals = [], []
        for files in folders:
            held_out, kept = stratified_split(files.labels or [0] * len(files), [self.val_fraction], self.seed)
            trains.append(files.subset(kept))
            vals.append(files.subset(held_out or kept))
        train, val = joined(trains), joined(vals)
        self._splits |= {f"{of}train": train, f"{of}val": val}
        return train, val

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
        return split_table(self._splits | self._used if labelled else self._splits)

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
            "split": split_identity(self._splits),
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
        split = split_identity(self._splits)
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

    # ------------------------------------------------------------------ images, decoded or cached
    def _training_images(self, samples: type[Images], files: ImageFiles, planned: bool = False) -> Images:
        """A dataset of random views, or with ``planned`` of what they are to be."""
        cached = self._cached(files)
        transform = self.train_transform if cached is None else self._train_transform(resized=True)
        return samples(files, transform, cached, self.views, planned)

    def _evaluation_images(self, samples: type[Images], files: ImageFiles) -> Images:
        """A dataset of images as evaluation sees them."""
        cached = self._cached(files)
        if cached is None:
            return samples(files, self.eval_transform)
        return samples(files, evaluation_transform(self.image_size, self.resize_size, self.crop, resized=True), cached)

    @property
    def _resized_side(self) -> int:
        return resized_side(self.image_size, self.resize_size, self.crop)

    def _cached(self, files: ImageFiles) -> CachedImages | None:
        """The cached pixels, here and not in ``setup`` since a checkpoint that is restored later may tell the size."""
        if self.cache == "none" or not files:
            return None
        side = self._resized_side
        self._caches = {key: cache for key, cache in self._caches.items() if cache.side == side}  # of no other model
        caches = []
        for paths in files.folders:  # whole folders, so that their parts and other seeds share one
            if (key := tuple(paths)) not in self._caches:
                self._caches[key] = ImageCache(paths, side, self.cache, self.cache_dir)
            caches.append(self._caches[key])
        return CachedImages(files, caches)

    # ------------------------------------------------------------------ loaders
    def _steps(self, images: int) -> int:
        """Batches in an epoch; not more than a ``limit_train_batches`` that is a number, so that none is prefetched in
        vain. (A fraction is taken of what is returned here.)"""
        steps = self.steps_per_epoch or max(1, images // (self.batch_size * self._world_size))
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        return min(steps, limit) if isinstance(limit, int) else steps

    def _stream_seed(self, stream: int) -> int:
        return 16 * self.seed + stream

    def _train_loader(
        self,
        files: ImageFiles,
        batch_size: int,
        steps: int,
        stream: int = 0,
        samples: type[Images] = LabelledImages,
    ) -> DataLoader[Any]:
        """Endless stream number ``stream`` of the run: every stream has an order and augmentations of its own."""
        self._announce()
        seed = self._stream_seed(stream)
        sampler = StreamSampler(files.domains, batch_size, steps, seed, self._rank, self._world_size, self._processed)
        images = self._training_images(samples, files, self.augment_on == "device")
        # a transform of the user's own may draw from generators that all threads share
        workers = self.workers if isinstance(images.transform, TrainingTransform) else "processes"
        return image_loader(
            SeededDraws(images, seed),
            self.num_workers,
            workers,
            collate_fn=whole,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=True,
            persistent_workers=True,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),
        )

    def _eval_loader(self, dataset: Dataset[Any], flag: str) -> DataLoader[Any]:
        size = len(dataset)  # type: ignore[arg-type]
        if size < self._world_size:
            raise ConfigurationError(
                f"Expected `{flag}` to hold an image for each of {self._world_size} processes, but found "
                f"{size}. Lower `--trainer.devices`."
            )
        self._announce()
        return image_loader(
            dataset,
            self.num_workers,
            self.workers,
            collate_fn=whole,
            batch_size=self.eval_batch_size,
            sampler=EvaluationShard(size, self._rank, self._world_size),
            persistent_workers=False,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else iterating draws from the run's generator
        )
