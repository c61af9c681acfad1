"""Which file is in which part of a split, written down and recognised."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

from framework.datamodules.folders import ImageFiles


def split_table(splits: Mapping[str, ImageFiles]) -> str:
    """The files of each part as CSV, a row each; of several folders with the folder's path."""
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


def split_identity(splits: Mapping[str, ImageFiles]) -> dict[str, str]:
    """The folders and a digest of the table: two splits with the same are the same."""
    roots = sorted({str(root.resolve()) for files in splits.values() for root in files.roots})
    return {"roots": "\n".join(roots), "digest": hashlib.sha256(split_table(splits).encode()).hexdigest()}


def write_manifest(folder: str | Path, table: str) -> None:
    """Write the table to ``split.csv``, if a resumed run has none there already."""
    path = Path(folder) / "split.csv"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table, encoding="utf-8")
