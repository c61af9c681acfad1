"""Compare methods: every method on every data file with every seed, one run after the other, and the table.

    python experiments/compare_methods.py --data experiments/data/mnist_to_optdigits.yaml --methods all --seeds 3
    python experiments/compare_methods.py --data experiments/data/solar_cells_poly.yaml --labels_per_class 0.1 1.0 \
        --methods full full:weights=none l2_sp:trade_off=0.1 --baseline full:weights=none --score mean_class_accuracy

A method is a file of experiments/methods, for pairs of domains, or of experiments/transfer, for one labelled folder;
``NAME:option=value,option=value`` changes options of the model, after those of both files; ``{seed}`` in a value is the
cell's seed, as in ``source_only:init_from=lightning_logs/pretraining/seed_{seed}/version_0/checkpoints/last.ckpt``.

Each run is a cell, kept in ``lightning_logs/<experiment>/cells`` under a hash of what it depends on: method, options,
the files of the data and their names, seed; not where things lie. A finished cell is not run again, so that an
interrupted comparison goes on where it stopped and a method more costs its own runs only. (The code is not part of the
hash: give another ``--experiment`` after a change of the framework.) A failed cell is reported, and the rest goes on.

Scores are those of the last weights on the test images (the target's). No label of a test image chooses anything.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import os
import re
import shutil
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from comparison_table import SCORES, student_t, write_csv, write_markdown

import framework
from framework.errors import ConfigurationError, did_you_mean

HERE = Path(__file__).resolve().parent
PAIR = "DomainPairDataModule"
METHODS = {PAIR: HERE / "methods", "ImageFolderDataModule": HERE / "transfer"}
BASELINES = {PAIR: "source_only", "ImageFolderDataModule": "full"}
FOLDERS = ("root", "source", "target", "source_val", "target_val", "target_test", "predict", "folders")
# where a run is done and what it shows, not what comes out
ASIDE = {
    "data": {"num_workers", "workers", "eval_batch_size", "check_images", "predict"},
    "trainer": {"enable_progress_bar"},
}


# ---------------------------------------------------------------------- what a cell is
@dataclass(frozen=True)
class Cell:
    """One run: a method on some data with a seed, and everything that it depends on."""

    method: str
    pair: str
    seed: int
    class_name: str
    model: dict[str, Any]
    data: dict[str, Any]
    trainer: dict[str, Any]
    data_class: str = PAIR

    def key(self, digest: Callable[[str], str]) -> str:
        """Hash of the configuration and of the data, without paths."""
        data = {name: value for name, value in self.data.items() if name not in ASIDE["data"]}
        for name in FOLDERS:
            if data.get(name):
                folders = data[name] if isinstance(data[name], list) else [data[name]]
                data[name] = [digest(folder) for folder in folders]
        trainer = {name: value for name, value in self.trainer.items() if name not in ASIDE["trainer"]}
        model = dict(self.model)
        for name in ("weights", "init_from"):
            if model.get(name) and Path(model[name]).is_file():
                model[name] = digest(model[name])
        content = {"class": self.class_name, "model": model, "data": data, "trainer": trainer, "seed": self.seed}
        if self.data_class != PAIR:
            content["data_class"] = self.data_class
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, Any]:
    """A configuration file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"Expected '{path}' to be a configuration file: {error.strerror}.") from error
    return content  # type: ignore[no-any-return]


def compose(
    method: str, pair: Path, seed: int, trainer: dict[str, Any], labels_per_class: int | float | None = None
) -> Cell:
    """Method file, then data file, then what was given here: what comes later wins, as on the command line."""
    configuration, kind = read(pair), data_class(pair)
    name, _, overrides = method.partition(":")
    chosen = read(METHODS[kind] / f"{name}.yaml")["model"]
    model = chosen.get("init_args", {}) | configuration.get("model", {}).get("init_args", {})
    overrides = overrides.replace("{seed}", str(seed))
    model |= {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in option_items(overrides))}
    options = configuration.get("trainer", {}) | trainer
    data, title = configuration["data"]["init_args"], pair.stem
    if labels_per_class is not None:
        data, title = data | {"labels_per_class": labels_per_class}, f"{title}, labels {labels_per_class}"
    return Cell(method, title, seed, chosen["class_path"], model, data, options, kind)


def data_class(pair: Path) -> str:
    """The datamodule of a data file."""
    kind = read(pair).get("data", {}).get("class_path")
    if kind not in METHODS:
        raise ConfigurationError(
            f"Expected `--data` to name files as in experiments/data, with `data.class_path` {' or '.join(METHODS)}, "
            f"but '{pair}' has {kind!r}."
        )
    return str(kind)


def option_items(overrides: str) -> list[str]:
    """``option=value,option=value`` split at its commas, but for those in brackets."""
    items, depth = [""], 0
    for character in overrides:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    items = [item for item in items if item]
    for item in items:
        if "=" not in item:
            raise ConfigurationError(f"Expected `--methods NAME:option=value,option=value`, but got {item!r} in it.")
    return items


def folder_digest(folder: str, known: dict[str, str] | None = None) -> str:
    """Hash of a file, or of the files below a folder, names and bytes; where there is none the run will say so."""
    known = {} if known is None else known
    if folder not in known:
        root = Path(folder)
        digest = hashlib.sha256(root.read_bytes() if root.is_file() else b"")
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        known[folder] = digest.hexdigest()
    return known[folder]


# ---------------------------------------------------------------------- running one
class Progress(L.Callback):
    """A line that says how far the run and the comparison are, and the time of each step."""

    def __init__(self, title: str, remaining: Callable[[float], str]) -> None:
        self.title, self.remaining, self.start = title, remaining, time.monotonic()
        self.times: list[float] = []
        self.intervals: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the time between epochs."""
        self.times = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time; on an accelerator the steps of many batches queue up, and the mean is right all the same."""
        self.times.append(time.perf_counter())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rewrite the line; where the output is no terminal, print one at the end only."""
        if len(self.times) > 1:  # the first batch waits for the loaders to start
            self.intervals.append((self.times[-1] - self.times[0]) / (len(self.times) - 1))
        done, planned = trainer.current_epoch + 1, trainer.max_epochs or 1
        seconds = time.monotonic() - self.start
        scores = trainer.callback_metrics
        accuracy = scores.get("val/source_accuracy", scores.get("val/accuracy"))
        loss = float(scores.get("val/loss", float("nan")))  # all that there is of a pre-training
        shown = f"loss {loss:.3f}" if accuracy is None else f"{float(accuracy):.1%}"
        line = f"{self.title}: epoch {done} of {planned}, {seconds:.0f} s, validation {shown}"
        line += self.remaining(seconds * (planned / done - 1))
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns
            print(f"\r{line[: columns - 1]:<{columns - 1}}", end="\n" if done == planned else "", flush=True)
        elif done == planned:
            print(line, flush=True)

    @property
    def seconds_per_step(self) -> float:
        """Median over the epochs of the mean time from one step's end to the next's, the wait for data included."""
        return statistics.median(self.intervals) if self.intervals else float("nan")


def run(cell: Cell, experiment: str, progress: Progress) -> dict[str, Any]:
    """Train and test a cell; its row of the table."""
    L.seed_everything(cell.seed, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = getattr(framework, cell.data_class)(**copy.deepcopy(cell.data))
        model = getattr(framework, cell.class_name)(data.num_classes, **copy.deepcopy(cell.model))
        trainer = framework.Trainer(
            experiment="/".join([experiment, *(re.sub(r"[^\w.=-]+", "_", part) for part in (cell.pair, cell.method))]),
            enable_progress_bar=False,
            callbacks=[progress],
            **cell.trainer,
        )
        trainer.fit(model, data)
        (scores,) = trainer.test(model, data, verbose=False)
    complaints = [text for text in (str(warning.message) for warning in caught) if text.startswith("At batch ")]
    return {
        "pair": cell.pair,
        "method": cell.method,
        "seed": cell.seed,
        **{name: scores[f"test/{name}"] for name in SCORES},
        "seconds_per_step": progress.seconds_per_step,
        "steps": trainer.fit_loop.epoch_loop.batch_progress.total.processed,
        "warnings": " | ".join(complaints),
        "status": "finished",
        "run": Path(os.path.relpath(trainer.log_dir or ".", Path("lightning_logs") / experiment)).as_posix(),
    }


class Clock:
    """How long the rest takes, from the mean time of the cells so far."""

    def __init__(self, cells: int) -> None:
        self.left, self.seconds = cells, list[float]()

    def __call__(self, rest_of_this: float) -> str:
        """The words for the line."""
        if self.left <= 1 or not self.seconds:
            return ""
        return f", all in about {(rest_of_this + (self.left - 1) * statistics.mean(self.seconds)) / 60:.0f} min"

    def done(self, seconds: float) -> None:
        """Count a cell."""
        self.left -= 1
        self.seconds.append(seconds)


def fill(cells: list[Cell], experiment: str) -> list[dict[str, Any]]:
    """The rows of all cells, in order: kept ones read, the others run; a failed one says so in ``status``."""
    store = Path("lightning_logs") / experiment / "cells"
    store.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    keys = [cell.key(lambda folder: folder_digest(folder, digests)) for cell in cells]
    kept = {key for key in keys if (store / f"{key}.json").exists()}
    clock = Clock(len(cells) - len(kept))
    checked: set[str] = set()
    print(f"{len(cells)} cells: {len(kept)} are finished, {clock.left} to run.", flush=True)
    rows = []
    for number, (cell, key) in enumerate(zip(cells, keys, strict=True), 1):
        path = store / f"{key}.json"
        if path.exists():  # looked up again: another comparison beside this one may have finished it
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            clock.left -= key not in kept
            continue
        title = f"[{number}/{len(cells)}] {cell.pair}, {cell.method}, seed {cell.seed}"
        start = time.monotonic()
        try:
            if cell.pair in checked:  # every image was decoded before the first run
                cell = replace(cell, data=cell.data | {"check_images": False})
            row = run(cell, experiment, Progress(title, clock)) | {"cell": key}
            checked.add(cell.pair)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(row, indent=1), encoding="utf-8")
            partial.replace(path)
        except Exception as error:  # whatever it is: the other cells do not depend on it
            row = {"pair": cell.pair, "method": cell.method, "seed": cell.seed, "cell": key}
            row["status"] = f"failed: {type(error).__name__}: {error}"
            print(f"{title}: {row['status']}", file=sys.stderr, flush=True)
            if not isinstance(error, ConfigurationError):
                traceback.print_exc()
        rows.append(row)
        clock.done(time.monotonic() - start)
    return rows


# ---------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """The options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--data", nargs="+", required=True, type=Path, metavar="YAML", help="as in experiments/data")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="files of experiments/methods (pairs of domains) or experiments/transfer (one folder), with "
        "NAME:option=value for changes; all: every file",
    )
    parser.add_argument("--baseline", metavar="NAME", help="what gains are over; default: source_only, or full")
    parser.add_argument("--score", choices=SCORES[:3], default="accuracy", help="what gains are in (default: accuracy)")
    parser.add_argument(
        "--labels_per_class",
        nargs="+",
        type=yaml.safe_load,
        default=[None],
        metavar="N",
        help="labelled training images of each class: a whole number, or a share such as 0.1; each is a block of rows",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, 0 to SEEDS - 1")
    parser.add_argument("--epochs", type=int, help="epochs of each run; default: what the data's file says")
    parser.add_argument("--precision", help="of the Trainer, such as bf16-mixed; default: what the data's file says")
    parser.add_argument("--experiment", default="comparison", help="folder below lightning_logs")
    return parser


def chosen_methods(names: list[str], kind: str = PAIR) -> list[str]:
    """The methods asked for, for a kind of datamodule; ``all`` stands for every file, the baseline first."""
    folder, first = METHODS[kind], BASELINES[kind]
    known = sorted((path.stem for path in folder.glob("*.yaml")), key=lambda name: (name != first, name))
    names = list(dict.fromkeys(one for name in names for one in (known if name == "all" else [name])))
    for name in names:
        if name.partition(":")[0] not in known:
            raise ConfigurationError(
                f"Expected `--methods` to name files of experiments/{folder.name}, but got {name!r}. "
                f"{did_you_mean(name, known)}"
            )
    return names


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 1 where a cell failed."""
    options = build_parser().parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    start = time.monotonic()
    try:
        if options.seeds < 1 or (options.epochs is not None and options.epochs < 1):
            raise ConfigurationError("Expected `--seeds` and `--epochs` to be 1 or more.")
        kinds = {data_class(pair) for pair in options.data}
        if len(kinds) > 1:
            raise ConfigurationError("Expected `--data` to be pairs of domains, or single folders, but got both.")
        (kind,) = kinds
        methods = chosen_methods(options.methods, kind)
        baseline = options.baseline or BASELINES[kind]
        if baseline not in methods:
            raise ConfigurationError(f"Expected `--baseline` to be among `--methods`, but got {baseline!r}.")
        given = {"max_epochs": options.epochs, "precision": options.precision}
        trainer = {name: value for name, value in given.items() if value}
        # seed by seed, so that an interrupted comparison has all methods with few seeds and not the reverse
        cells = [
            compose(method, pair, seed, trainer, labels)
            for seed in range(options.seeds)
            for pair in options.data
            for labels in options.labels_per_class
            for method in methods
        ]
        if options.seeds > 1:
            student_t(1)  # fails now rather than after hours
        rows = fill(cells, options.experiment)
    except ConfigurationError as error:
        print(f"compare_methods: error: {error}", file=sys.stderr)
        return 2
    folder = Path("lightning_logs") / options.experiment
    text = write_markdown(rows, methods, list(dict.fromkeys(c.pair for c in cells)), [baseline], options.score)
    (folder / "table.csv").write_text(write_csv(rows), encoding="utf-8")
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(f"\nScores of the last weights on the test images; no label of theirs was used.\n\n{text}")
    print(f"{time.monotonic() - start:.0f} s. {folder / 'table.md'}, {folder / 'table.csv'}; to see the runs:")
    print(f"    tensorboard --logdir {folder}")
    failed = [row for row in rows if row["status"] != "finished"]
    if failed:
        print(f"{len(failed)} of {len(rows)} cells failed; the same command tries them again.", file=sys.stderr)
        if any("does not exist" in row["status"] for row in failed):
            print("Data of this project is written by the scripts scripts/prepare_*.py.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
