"""Reading folders of images: what lies where, and clear words for what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from framework.errors import ConfigurationError


@dataclass(frozen=True)
class ImageFiles:
    """The images below one folder, or below several that are used together.

    Attributes:
        roots: the folders.
        paths: the files; those of a folder sorted.
        labels: a class index for each file; empty where labels are not known or not read.
        classes: class names in the order of their indices; empty without labels.
        domains: which of ``roots`` each file is below.
        folders: all the files below each of ``roots``, whatever part of them this is.
    """

    roots: list[Path]
    paths: list[str]
    labels: list[int]
    classes: list[str]
    domains: list[int]
    folders: list[list[str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Sequence[int]) -> ImageFiles:
        """The files at ``indices``, in that order."""
        labels = [self.labels[i] for i in indices] if self.labels else []
        domains = [self.domains[i] for i in indices]
        paths = [self.paths[i] for i in indices]
        return ImageFiles(self.roots, paths, labels, self.classes, domains, self.folders)

    def without_labels(self) -> ImageFiles:
        """The same files with their labels forgotten."""
        return ImageFiles(self.roots, self.paths, [], [], self.domains, self.folders)


def joined(folders: Sequence[ImageFiles]) -> ImageFiles:
    """The images of several folders, each a domain of its own; the classes are the same.

    The folders take turns, so that the first images are of all of them: ``Trainer(overfit_batches=...)`` takes those.
    """
    if len(folders) == 1:
        return folders[0]
    turns = sorted((i, domain) for domain, files in enumerate(folders) for i in range(len(files)))
    return ImageFiles(
        roots=[root for files in folders for root in files.roots],
        paths=[folders[domain].paths[i] for i, domain in turns],
        labels=[folders[domain].labels[i] for i, domain in turns if folders[domain].labels],
        classes=folders[0].classes,
        domains=[domain for _, domain in turns],
        folders=[paths for files in folders for paths in files.folders],
    )


def _raise(error: OSError) -> None:
    raise error


def _checked_folder(folder: str | Path, flag: str) -> Path:
    path = Path(folder).expanduser()
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:  # a folder above it is closed to us, or the name is too long
        raise _unreadable(flag, folder, error) from error
    if not exists:
        raise ConfigurationError(f"Expected `{flag}` to be a folder of images, but '{folder}' does not exist.")
    if not is_folder:
        raise ConfigurationError(f"Expected `{flag}` to be a folder of images, but '{folder}' is a file.")
    return path


def _unreadable(flag: str, folder: str | Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"Expected `{flag}` to be a folder that can be read, but '{folder}' cannot: {error.strerror}."
    )


def _images_below(folder: Path, flag: str) -> list[str]:
    """All image files below ``folder``, sorted; hidden files and folders are passed over."""
    found = []
    try:
        for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [
                os.path.join(parent, name)  # noqa: PTH118 (a large folder has a million files)
                for name in sorted(files)
                if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
            ]
    except OSError as error:
        raise _unreadable(flag, error.filename, error) from error
    return found


def subfolders(folder: str | Path, flag: str) -> list[str]:
    """Names of the folders in ``folder``, sorted; hidden ones are passed over."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise _unreadable(flag, folder, error) from error


def class_names(folder: str | Path, flag: str) -> list[str]:
    """The class folders of an ImageFolder, sorted: the class indices are their positions.

    Args:
        folder: an ImageFolder, ``folder/<class>/*``.
        flag: the option that an error message names.

    Raises:
        ConfigurationError: the folder cannot be read, or holds fewer than two class folders.
    """
    path = _checked_folder(folder, flag)
    names = subfolders(path, flag)
    if len(names) < 2:
        raise ConfigurationError(
            f"Expected `{flag}` to hold a folder for each of at least two classes, but found "
            f"{len(names)} under '{folder}'."
        )
    return names


def common_class_names(folders: Sequence[str], flag: str) -> list[str]:
    """The class folders of one ImageFolder or of several with the same ones, sorted.

    Raises:
        ConfigurationError: as :func:`class_names`, or the classes of a folder differ from those of the first.
    """
    names = class_names(folders[0], flag)
    for folder in folders[1:]:
        own = class_names(folder, flag)
        if own != names:
            missing, extra = sorted(set(names) - set(own)), sorted(set(own) - set(names))
            raise ConfigurationError(
                f"Expected every folder of `{flag}` to hold the same classes, but under '{folder}' are missing: "
                f"{_shortened(missing)}; and not under '{folders[0]}': {_shortened(extra)}."
            )
    return names


def labelled_images(folder: str | Path, flag: str, classes: Sequence[str] | None = None) -> ImageFiles:
    """The images of an ImageFolder with their class indices.

    Args:
        folder: an ImageFolder, ``folder/<class>/*``.
        flag: the option that an error message names.
        classes: class names that the folder must agree with, in the order of their indices.

    Raises:
        ConfigurationError: the folder cannot be read, a class is empty, or its classes differ from ``classes``.
    """
    names = class_names(folder, flag)
    if classes is not None and names != list(classes):
        missing = sorted(set(classes) - set(names))
        extra = sorted(set(names) - set(classes))
        raise ConfigurationError(
            f"Expected `{flag}` to hold the {len(classes)} classes of the training images, but under '{folder}' "
            f"are missing: {_shortened(missing)}; and not among those of training: {_shortened(extra)}."
        )
    root = Path(folder).expanduser()
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(names):
        images = _images_below(root / name, flag)
        if not images:
            empty.append(name)
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise _no_images(flag, folder)
    if empty:
        raise ConfigurationError(
            f"Expected every class folder of `{flag}` to hold images, but found none in {_shortened(empty)} "
            f"under '{folder}'. Remove the folder or fill it."
        )
    return ImageFiles([root], paths, labels, names, [0] * len(paths), [paths])


def unlabelled_images(folder: str | Path, flag: str) -> ImageFiles:
    """The images anywhere below a folder; sub-folders, class folders or not, tell nothing.

    Raises:
        ConfigurationError: the folder cannot be read, or holds no images.
    """
    root = _checked_folder(folder, flag)
    paths = _images_below(root, flag)
    if not paths:
        raise _no_images(flag, folder)
    return ImageFiles([root], paths, [], [], [0] * len(paths), [paths])


def _no_images(flag: str, folder: str | Path) -> ConfigurationError:
    return ConfigurationError(
        f"Expected `{flag}` to hold images, but found none under '{folder}' (looked for {', '.join(IMG_EXTENSIONS)})."
    )


def _shortened(names: Sequence[str], most: int = 10) -> str:
    if not names:
        return "none"
    return ", ".join(repr(name) for name in names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def few_of_each_class(files: ImageFiles, amount: int | float, seed: int, flag: str) -> tuple[list[int], list[int]]:
    """Indices of a few images of each class, of each folder by itself, and those of the others; both sorted.

    They are nested: what a smaller amount chooses, a larger one chooses too.

    Args:
        files: labelled images.
        amount: how many of each class as a whole number, or a share of them as a fraction, of which 1.0 is all; at
            least one.
        seed: seed of the choice.
        flag: the option that an error message names.

    Raises:
        ConfigurationError: a class has fewer than ``amount`` images.
    """
    chosen: set[int] = set()
    for domain, root in enumerate(files.roots):
        generator = torch.Generator().manual_seed(seed)  # the order of the folders plays no part
        by_class: dict[int, list[int]] = {}
        for index, label in enumerate(files.labels):
            if files.domains[index] == domain:
                by_class.setdefault(label, []).append(index)
        for label in sorted(by_class):
            members = by_class[label]
            if isinstance(amount, int) and amount > len(members):
                raise ConfigurationError(
                    f"Expected `{flag}` to be no more than a class has training images, but got {amount}, and "
                    f"{files.classes[label]!r} has {len(members)} under '{root}'."
                )
            count = amount if isinstance(amount, int) else max(1, round(amount * len(members)))
            order = torch.randperm(len(members), generator=generator).tolist()
            chosen.update(members[i] for i in order[:count])
    return sorted(chosen), [index for index in range(len(files)) if index not in chosen]


def stratified_split(labels: Sequence[int], fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Indices split at random, each class by itself.

    Args:
        labels: the class of each sample (all 0 where labels are unknown: a plain random split).
        fractions: share of each class that goes to each part; what is left over is the last list.
        seed: seed of the split.

    Returns:
        ``len(fractions) + 1`` sorted lists of indices. A class keeps at least one sample in the last list.
    """
    generator = torch.Generator().manual_seed(seed)
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    for label in sorted(by_class):
        members = by_class[label]
        shuffled = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        for part, fraction in enumerate(fractions):
            count = min(round(fraction * len(members)), len(shuffled) - 1)
            parts[part] += shuffled[:count]
            shuffled = shuffled[count:]
        parts[-1] += shuffled
    return [sorted(part) for part in parts]
