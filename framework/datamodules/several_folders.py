"""Several folders that are trained on together: which they are, and what must hold for them in a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from framework.errors import ConfigurationError


def folder_list(given: str | Sequence[str], flag: str) -> list[str]:
    """One folder or several, none of them twice.

    Args:
        given: the option's value.
        flag: the option that an error message names.
    """
    folders = [given] if isinstance(given, str | Path) else list(given)
    if not folders:
        raise ConfigurationError(f"Expected `{flag}` to name a folder or several, but got an empty list.")
    paths = resolved(folders)
    for i, folder in enumerate(folders):
        if paths[i] in paths[:i]:
            first = folders[paths.index(paths[i])]
            again = f"'{folder}' twice" if first == folder else f"'{folder}', which is '{first}' again"
            raise ConfigurationError(f"Expected `{flag}` to name each folder once, but got {again}.")
    return folders


def resolved(folders: Sequence[str]) -> list[str]:
    """The folders as absolute paths without links."""
    return [str(Path(folder).expanduser().resolve()) for folder in folders]


def check_equal_shares(folders: Sequence[str], flag: str, batch_size: int) -> None:
    """Refuse a batch that cannot hold equally many images of each folder."""
    if rest := batch_size % (several := len(folders)):
        near = " or ".join(str(size) for size in (batch_size - rest, batch_size - rest + several) if size)
        raise ConfigurationError(
            f"Expected `--data.batch_size` to be a multiple of {several}, the folders of `{flag}`, of which "
            f"every batch holds equally many images, but got {batch_size}. Take {near}."
        )


def folders_state(folders: Sequence[str]) -> list[str] | None:
    """What a checkpoint says of the folders: which they are, in the order of the domains; of one folder nothing."""
    return resolved(folders) if len(folders) > 1 else None


def check_same_folders(before: Sequence[str] | None, folders: Sequence[str], flag: str) -> None:
    """Refuse to go on with more or fewer folders than a run had, or with the same in another order.

    Args:
        before: what :func:`folders_state` said of the run.
        folders: those of now.
        flag: the option that an error message names.
    """
    before, now = before or [""], resolved(folders)
    if len(before) != len(now):
        raise ConfigurationError(
            f"Expected `{flag}` to name as many folders as in the run of the checkpoint, {len(before)}, but "
            f"got {len(now)}: its position in the data means nothing for others."
        )
    if before != now and sorted(before) == sorted(now):
        raise ConfigurationError(
            f"Expected the folders of `{flag}` in the order of the checkpoint's run, "
            f"'[{', '.join(before)}]', but got them in another: domain 0 would be another one."
        )
