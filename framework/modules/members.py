"""Trained classifiers as fixed functions of images: the members of an ensemble, the teachers of a student."""

from __future__ import annotations

import contextvars
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor

from framework.errors import ConfigurationError
from framework.networks import FrozenCopy, Preprocessing

Checkpoint = dict[str, Any]

# what continues a run, and says nothing of the network
OF_THE_RUN = (
    *("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers"),
    *("current_model_state", "averaging_state", "datamodule_hparams_name", "datamodule_hyper_parameters"),
)


def read_checkpoint(path: str | Path, flag: str) -> Checkpoint:
    """A checkpoint of a classifier; its tensors stay in the file until they are used.

    Args:
        path: the file.
        flag: what names it on the command line, for the messages.

    Raises:
        ConfigurationError: a file that is not there, cannot be read, or is of something else.
    """
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ConfigurationError(f"Expected `{flag}` to be a checkpoint file, but '{path}' {what}.")
    try:
        checkpoint: Checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        classes, state = checkpoint["hyper_parameters"]["num_classes"], checkpoint["state_dict"]
        readable = isinstance(classes, int) and bool(state)
    except Exception as error:  # a broken file can break the loader in any way
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"Expected `{flag}` to be a checkpoint of a classifier of this framework, but '{path}' cannot be read as "
            f"one: {type(error).__name__}: {reason}"
        ) from error
    if not readable:
        raise ConfigurationError(
            f"Expected `{flag}` to be a checkpoint of a classifier of this framework, but '{path}' is of another kind."
        )
    return checkpoint


def rebuild(checkpoint: Checkpoint, where: str) -> L.LightningModule:
    """The module that a checkpoint in memory is of, as ``load_from_checkpoint`` builds it from a file.

    Raises:
        ConfigurationError: the checkpoint does not name its class, or one that nothing has imported.
    """
    if "_class_path" not in checkpoint["hyper_parameters"]:
        raise ConfigurationError(
            f"Expected '{where}' to name the class of its module, but it does not: it was written by a class of a "
            "script that was run itself. Define the class in a module of its own."
        )
    file = io.BytesIO()
    torch.save({key: value for key, value in checkpoint.items() if key not in OF_THE_RUN}, file)
    file.seek(0)
    try:
        # in a context of its own: within the command line's, the module would take the outer one's hyperparameters
        module = contextvars.Context().run(
            lambda: L.LightningModule.load_from_checkpoint(file, map_location="cpu", weights_only=True)
        )
    except ValueError as error:
        if isinstance(error, ConfigurationError) or "imported" not in str(error):
            raise
        raise ConfigurationError(f"Expected the class of '{where}' to be imported, but: {error}") from error
    assert isinstance(module, L.LightningModule)
    return module


def trained_on(checkpoint: Checkpoint) -> Preprocessing | None:
    """Size and normalisation of the images that a checkpoint's network was trained on, if it says so."""
    data = checkpoint.get("datamodule_hyper_parameters") or {}
    older = {name: data.get(name) for name in Preprocessing._fields}
    described = checkpoint.get("preprocessing") or (None if None in older.values() else older)
    return None if described is None else Preprocessing.of(described, "the checkpoint")


class Member(FrozenCopy):
    """A classifier that never changes, which takes images as the data of the run normalises them.

    Args:
        checkpoint: of the classifier, with its state dict.
        file: where the checkpoint is from, for the record.
        resize: bring images to the size that the classifier was trained on.

    Attributes:
        record: the checkpoint without its weights and without what continues its run: plain values, from which, with
            the weights that are in the state dict, :meth:`restore` builds the member again.
    """

    def __init__(self, checkpoint: Checkpoint, file: str, resize: bool = False) -> None:
        super().__init__(rebuild(checkpoint, file))
        self.file, self.resize = file, resize
        self.num_classes = int(checkpoint["hyper_parameters"]["num_classes"])
        self.class_names: list[str] | None = checkpoint.get("class_names")
        self.trained_on = trained_on(checkpoint)
        self.record = {key: value for key, value in checkpoint.items() if key not in OF_THE_RUN and not _is_data(value)}
        del self.record["state_dict"]
        self.record["file"] = file
        if self.trained_on is not None:
            self.record["preprocessing"] = self.trained_on.plain()
        self._flag = "--model.resize"
        self._scale_and_shift: tuple[list[float], list[float]] | None = None
        self._columns: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def restore(cls, record: Checkpoint, state: Mapping[str, Tensor], prefix: str, resize: bool = False) -> Member:
        """The member of a ``record`` whose weights are in ``state`` below ``prefix``."""
        prefix = f"{prefix}module."
        weights = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        return cls({**record, "state_dict": weights}, record["file"], resize)

    def prepare(self, data: Any, flag: str) -> None:
        """Learn what the images of a run are like, before its first batch.

        Args:
            data: the run's datamodule, or None.
            flag: what sets ``resize``, for the message.

        Raises:
            ConfigurationError: they have another size than the classifier's, and ``resize`` is off.
        """
        self._flag, self._scale_and_shift, self._columns = flag, None, {}
        given: Preprocessing | None = getattr(data, "preprocessing", None)
        if given is None or self.trained_on is None:
            return
        self._is_other_size(given.image_size)
        (_, mean, std), (_, own_mean, own_std) = given, self.trained_on
        if (mean, std) != (own_mean, own_std):  # (x std + mean - own mean) / own std
            scale = [s / t for s, t in zip(std, own_std, strict=True)]
            shift = [(m - n) / t for m, n, t in zip(mean, own_mean, own_std, strict=True)]
            self._scale_and_shift = (scale, shift)

    def _is_other_size(self, size: int) -> bool:
        other = self.trained_on is not None and size != self.trained_on.image_size
        if other and not self.resize:
            raise ConfigurationError(
                f"Expected `--data.image_size` to be {self.trained_on.image_size}, as in the training of "  # type: ignore[union-attr]
                f"'{self.file}', but got {size}. `{self._flag} true` resizes the images for it."
            )
        return other

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, K]`` of images ``[N, 3, H, W]``, normalised as the run's data does."""
        with torch.no_grad():
            if self._scale_and_shift is not None:
                scale, shift = self._on(images)
                images = images * scale + shift
            if self.trained_on is not None and self._is_other_size(images.shape[-1]):
                size = 2 * [self.trained_on.image_size]
                images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
            logits: Tensor = self.module(images)
            return logits

    def _on(self, images: Tensor) -> Tensor:
        key = (images.device, images.dtype)
        if key not in self._columns:  # once: a copy to the device makes the host wait
            with torch.inference_mode(False):
                columns = torch.tensor(self._scale_and_shift, dtype=key[1], device=key[0])
            self._columns[key] = columns.view(2, 3, 1, 1)
        return self._columns[key]


def members_of(paths: Sequence[str], flag: str, num_classes: int, resize: bool = False) -> list[Member]:
    """The members of checkpoint files, all of the same classes.

    Raises:
        ConfigurationError: a file that cannot be used, another number of classes than ``num_classes``, or other names
            than the first file's.
    """
    members = [Member(read_checkpoint(path, flag), str(path), resize) for path in paths]
    for member in members:
        if member.num_classes != num_classes:
            raise ConfigurationError(
                f"Expected `{flag}` to have {num_classes} classes, as the data has, but '{member.file}' has "
                f"{member.num_classes}."
            )
    named = [member for member in members if member.class_names is not None]
    for member in named[1:]:
        check_names(named[0].class_names, member, flag, f"'{named[0].file}'")
    return members


def check_names(names: Sequence[str] | None, member: Member, flag: str, whose: str) -> None:
    """Refuse a member of other classes than ``names``, or in another order; where one does not say, it passes."""
    if names is None or member.class_names is None:
        return
    for index, (name, other) in enumerate(zip(names, member.class_names, strict=False)):
        if str(name) != other:
            raise ConfigurationError(
                f"Expected `{flag}` to have the classes of {whose}, but class {index} is {str(name)!r} there and "
                f"{other!r} in '{member.file}'."
            )


def _is_data(value: Any) -> bool:
    return isinstance(value, dict) and "batches" in value and "split" in value  # a datamodule's position
