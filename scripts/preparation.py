"""What the scripts that write ImageFolders from installed packages share: whole domains or none, the same for a seed.

A domain is written into a temporary folder beside its place and renamed when whole, so a folder that is there is
complete; its ``.complete.json`` says what it was made with. What this did not write, it does not touch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

MARKER = ".complete.json"
# Writing a domain takes seconds: a temporary folder this old was left by a run that was killed.
ABANDONED_AFTER_SECONDS = 600


class PreparationError(ValueError):
    """The images cannot be written as asked; the message is the one line that the user sees."""


class Image(NamedTuple):
    """One image to write, as ``<part>/<label>/<name>.png``."""

    part: str
    label: int | str
    name: str
    pixels: np.ndarray | Path  # [H, W] or [H, W, 3], uint8; or a PNG file that is copied as it is


def missing_package(error: ImportError, extra: str) -> PreparationError:
    """The error where a package is not installed that an extra of the project brings."""
    return PreparationError(
        f'The images need the package {error.name!r}, which is not installed: pip install "transfer-framework[{extra}]"'
    )


def stratified_split(labels: np.ndarray, test_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test images, both ascending.

    Each class gives its share of ``test_images``, rounded so that the sum is exact (largest remainders first).
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    shares = counts * test_images / len(labels)
    quotas = np.floor(shares).astype(np.int64)
    missing = test_images - int(quotas.sum())
    quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
    test = np.concatenate(
        [generator.permutation(np.flatnonzero(labels == k))[:quota] for k, quota in zip(classes, quotas, strict=True)]
    )
    return np.setdiff1d(np.arange(len(labels)), test), np.sort(test)


@dataclass(frozen=True)
class Preparation:
    """A script: what it writes and what it is asked for.

    Attributes:
        script: its file's name, for messages.
        description: the first line of its help.
        output: the folder of the domains, by default.
        domains: by name, what makes the images from the parsed options (``seed`` and the script's own).
        extra: the project's extra that brings the packages.
        version: to be raised when the same options would no longer write the same images: older folders are then
            refused, not mixed.
        choices: the names of options, beside the seed, that decide what is written.
        add_options: adds these to the parser.
    """

    script: str
    description: str
    output: Path
    domains: dict[str, Callable[[argparse.Namespace], Iterator[Image]]]
    extra: str
    version: int = 1
    choices: tuple[str, ...] = ()
    add_options: Callable[[argparse.ArgumentParser], None] = field(default=lambda parser: None)

    # ------------------------------------------------------------------ one domain
    def prepare_domain(self, domain: str, options: argparse.Namespace) -> str:
        """Write ``output/domain`` unless it is there already; returns the line that says what was done.

        Raises:
            PreparationError: a package is missing, or the folder holds something else (another seed, other files).
        """
        folder = options.output / domain
        wanted = {"domain": domain, "seed": options.seed, "version": self.version}
        wanted |= {name: getattr(options, name) for name in self.choices}
        made = ", ".join(f"{name} {wanted[name]}" for name in ("seed", *self.choices))
        # --overwrite never removes what this script did not write
        replace = options.overwrite and read_marker(folder) is not None
        if not replace and _is_done(folder, wanted):
            return f"{domain}: already complete in {folder} ({made})"

        options.output.mkdir(parents=True, exist_ok=True)
        remove_abandoned(options.output, domain)
        token = secrets.token_hex(4)
        partial, old = (options.output / f".{domain}.partial-{token}{end}" for end in ("", "-old"))
        partial.mkdir()
        try:
            counts = self._write(partial, self.domains[domain](options), wanted)
            if replace:
                folder.rename(old)
            try:
                partial.rename(folder)
            except OSError:
                # Another run was quicker. Its images are as good as ours if they are the same ones.
                if not _is_done(folder, wanted):
                    raise
                return f"{domain}: already complete in {folder} ({made})"
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return f"{domain}: {counts['train']:,} training and {counts['test']:,} test images in {folder} ({made})"

    def _write(self, folder: Path, images: Iterator[Image], wanted: dict[str, Any]) -> dict[str, int]:
        """Write all images and, last, the marker into the folder; returns how many images each part has."""
        try:
            from PIL import Image as PillowImage
        except ImportError as error:
            raise missing_package(error, self.extra) from error
        for image in images:
            path = folder / image.part / str(image.label) / f"{image.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(image.pixels, Path):
                shutil.copyfile(image.pixels, path)
            else:
                PillowImage.fromarray(image.pixels).save(path)
        counts = _count(folder)
        text = json.dumps(wanted | {"images": counts}, indent=2)
        (folder / MARKER).write_text(text + "\n", encoding="utf-8")
        return counts

    # ------------------------------------------------------------------ command line
    def build_parser(self) -> argparse.ArgumentParser:
        """The command line's parser."""
        parser = argparse.ArgumentParser(description=self.description, allow_abbrev=False)
        add = parser.add_argument
        add("--output", type=Path, default=self.output, help="the folder for the domains (default: %(default)s)")
        add("--seed", type=int, default=0, help="seed of the splits, and of all that is drawn (default: %(default)s)")
        names = list(self.domains)
        add("--domains", nargs="+", choices=names, default=names, help="which domains to write (default: all)")
        add(
            "--overwrite",
            action="store_true",
            help="replace domains that this script wrote before, whatever they were made with",
        )
        self.add_options(parser)
        return parser

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command line; returns the exit status."""
        parser = self.build_parser()
        options = parser.parse_args(arguments)
        if options.seed < 0:
            parser.error(f"argument --seed: expected 0 or more, but got {options.seed}")
        try:
            for domain in dict.fromkeys(options.domains):
                print(self.prepare_domain(domain, options), flush=True)
        except (PreparationError, OSError) as error:
            print(f"{self.script}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        return 0

    def run(self) -> None:
        """``main`` for a shell: as an exception, a termination request removes the temporary folder on its way out."""
        signal.signal(signal.SIGTERM, _stop)
        sys.exit(self.main())


def _stop(signal_number: int, _frame: object) -> None:
    sys.exit(128 + signal_number)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What the domain's marker says, or nothing if no script of these completed the folder."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _count(folder: Path) -> dict[str, int]:
    return {part: sum(1 for _ in (folder / part).glob("*/*.png")) for part in ("train", "test")}


def _is_done(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder already holds this domain. A folder that holds anything else is an error."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marker = read_marker(folder)
    if marker is None:
        raise PreparationError(
            f"Expected '{folder}' to be absent or written by this script, but it holds something else: "
            "name another folder with --output, or remove it."
        )
    choice = "name another folder with --output, or replace it with --overwrite."
    found = {key: marker.get(key) for key in wanted}
    if found != wanted:
        raise PreparationError(f"Expected '{folder}' to be made with {wanted}, but it was made with {found}: {choice}")
    counts = _count(folder)
    if counts != marker.get("images"):
        raise PreparationError(
            f"Expected '{folder}' to hold {marker.get('images')} images, but found {counts}: {choice}"
        )
    return True


def remove_abandoned(output: Path, domain: str) -> None:
    """Remove what a killed run has left of a domain."""
    for folder in output.glob(f".{domain}.partial-*"):
        # a run beside this one may remove its folder at any time
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
