"""Compare methods: every method on every pair of domains with every seed, one run after the other, and the table.

    python experiments/compare_methods.py --data experiments/data/mnist_to_optdigits.yaml --methods all --seeds 3

Each run is a cell, kept in ``lightning_logs/<experiment>/cells`` under a hash of what it depends on: method, options,
the files of the data and their names, seed; not where things lie. A finished cell is not run again, so that an
interrupted comparison goes on where it stopped and a method more costs its own runs only. (The code is not part of the
hash: give another ``--experiment`` after a change of the framework.) A failed cell is reported, and the rest goes on.

Accuracies are those of the last weights on the target's test images. No target label chooses anything.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import json
import logging
import os
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

import framework
from framework.errors import ConfigurationError, did_you_mean

METHODS = Path(__file__).resolve().parent / "methods"
BASELINE = "source_only"
FOLDERS = ("source", "target", "source_val", "target_val", "target_test", "predict")
# where a run is done and what it shows, not what comes out
ASIDE = {"data": {"num_workers", "eval_batch_size", "check_images", "predict"}, "trainer": {"enable_progress_bar"}}
SCORES = ["accuracy", "mean_class_accuracy", "macro_f1", "calibration_error"]
COLUMNS = ["pair", "method", "seed", *SCORES, "seconds_per_step", "steps", "warnings", "status", "run", "cell"]


# ---------------------------------------------------------------------- what a cell is
@dataclass(frozen=True)
class Cell:
    """One run: a method on a pair with a seed, and everything that it depends on."""

    method: str
    pair: str
    seed: int
    class_name: str
    model: dict[str, Any]
    data: dict[str, Any]
    trainer: dict[str, Any]

    def key(self, digest: Callable[[str], str]) -> str:
        """Hash of the configuration and of the data, without paths."""
        data = {name: value for name, value in self.data.items() if name not in ASIDE["data"]}
        for name in FOLDERS:
            if data.get(name):
                folders = data[name] if isinstance(data[name], list) else [data[name]]
                data[name] = [digest(folder) for folder in folders]
        trainer = {name: value for name, value in self.trainer.items() if name not in ASIDE["trainer"]}
        content = {"class": self.class_name, "model": self.model, "data": data, "trainer": trainer, "seed": self.seed}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, Any]:
    """A configuration file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"Expected '{path}' to be a configuration file: {error.strerror}.") from error
    return content  # type: ignore[no-any-return]


def compose(method: str, pair: Path, seed: int, trainer: dict[str, Any]) -> Cell:
    """Method file, then data file, then ``trainer``: what comes later wins, as on the command line."""
    chosen, configuration = read(METHODS / f"{method}.yaml")["model"], read(pair)
    if "data" not in configuration:
        raise ConfigurationError(f"Expected `--data` to name files as in experiments/data, but '{pair}' has no `data`.")
    model = chosen.get("init_args", {}) | configuration.get("model", {}).get("init_args", {})
    options = configuration.get("trainer", {}) | trainer
    return Cell(method, pair.stem, seed, chosen["class_path"], model, configuration["data"]["init_args"], options)


def folder_digest(folder: str, known: dict[str, str] | None = None) -> str:
    """Hash of the files below a folder, names and bytes; empty where there is no folder (the run will say so)."""
    known = {} if known is None else known
    if folder not in known:
        digest = hashlib.sha256()
        root = Path(folder)
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
        accuracy = float(trainer.callback_metrics.get("val/source_accuracy", float("nan")))
        line = f"{self.title}: epoch {done} of {planned}, {seconds:.0f} s, source validation {accuracy:.1%}"
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
        data = framework.DomainPairDataModule(**copy.deepcopy(cell.data))
        model = getattr(framework, cell.class_name)(data.num_classes, **copy.deepcopy(cell.model))
        trainer = framework.Trainer(
            experiment=f"{experiment}/{cell.pair}/{cell.method}",
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


# ---------------------------------------------------------------------- tables
def write_csv(rows: list[dict[str, Any]]) -> str:
    """One line a cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def paired_gain(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, float] | None:
    """Mean gain over the baseline on common seeds, and half the width of its 95 % confidence interval (Student's t);
    NaN for the second with a single seed, None without any."""
    gains = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if not gains:
        return None
    if len(gains) == 1:
        return gains[0], float("nan")
    quantile = student_t(len(gains) - 1)
    return statistics.mean(gains), quantile * statistics.stdev(gains) / len(gains) ** 0.5


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ConfigurationError(
            "Expected SciPy for the confidence interval, but it is not installed: "
            "pip install 'transfer-framework[comparison]'."
        ) from error
    return float(t.ppf(0.975, degrees))


def _mean_and_deviation(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def write_markdown(rows: list[dict[str, Any]], methods: list[str], pairs: list[str], to: str = BASELINE) -> str:
    """One line a method and pair, best first: means over the seeds with standard deviations (n - 1), the gain over the
    method ``to`` and the time of a step relative to its."""
    head = ["target", "method", "accuracy, %", "class mean, %", f"gain over {to} ± 95 %", "step time", "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for pair in pairs:
        finished = [row for row in rows if row["pair"] == pair and row["status"] == "finished"]
        of = {method: {row["seed"]: row for row in finished if row["method"] == method} for method in methods}
        failed = {row["method"] for row in rows if row["pair"] == pair and row["status"] != "finished"}
        baseline = of.get(to, {})
        target = pair.split("_to_", 1)[-1]

        def accuracies(method: str, of: dict[str, dict[int, dict[str, Any]]] = of) -> dict[int, float]:
            return {seed: row["accuracy"] for seed, row in of[method].items()}

        def mean(method: str, accuracies: Callable[[str], dict[int, float]] = accuracies) -> float:
            return statistics.mean(accuracies(method).values())

        for method in sorted((method for method in methods if of[method]), key=mean, reverse=True):
            cells = of[method]
            gain, ratio = "", ""
            paired = paired_gain(accuracies(method), accuracies(to)) if baseline else None
            if paired is not None and method != to:
                interval = f" ± {100 * paired[1]:.1f}" if paired[1] == paired[1] else ""
                gain = f"{100 * paired[0]:+.1f}{interval}"
            common = sorted(cells.keys() & baseline.keys())
            if common:
                times = [cells[seed]["seconds_per_step"] / baseline[seed]["seconds_per_step"] for seed in common]
                ratio = f"{statistics.median(times):.2f}"
            scores = _mean_and_deviation(list(accuracies(method).values()))
            classes = _mean_and_deviation([row["mean_class_accuracy"] for row in cells.values()])
            count = f"{len(cells)}" + (", others failed" if method in failed else "")
            lines.append(f"| {target} | {method} | {scores} | {classes} | {gain} | {ratio} | {count} |")
        lines += [
            f"| {target} | {method} | failed | | | | 0 |" for method in methods if method in failed and not of[method]
        ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """The options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--data", nargs="+", required=True, type=Path, metavar="YAML", help="as in experiments/data")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], metavar="NAME", help="experiments/methods/NAME.yaml, or all"
    )
    parser.add_argument(
        "--baseline", default=BASELINE, metavar="NAME", help="the method that gains are measured against"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, 0 to SEEDS - 1")
    parser.add_argument("--epochs", type=int, help="epochs of each run; default: what the data's file says")
    parser.add_argument("--experiment", default="comparison", help="folder below lightning_logs")
    return parser


def chosen_methods(names: list[str]) -> list[str]:
    """The method files asked for, source-only first."""
    known = sorted((path.stem for path in METHODS.glob("*.yaml")), key=lambda name: (name != BASELINE, name))
    if names == ["all"]:
        return known
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"Expected `--methods` to name files of experiments/methods, but got {name!r}. "
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
        methods = chosen_methods(options.methods)
        if options.baseline not in methods:
            raise ConfigurationError(f"Expected `--baseline` to be among `--methods`, but got {options.baseline!r}.")
        trainer = {"max_epochs": options.epochs} if options.epochs else {}
        # seed by seed, so that an interrupted comparison has all methods with few seeds and not the reverse
        cells = [
            compose(method, pair, seed, trainer)
            for seed in range(options.seeds)
            for pair in options.data
            for method in methods
        ]
        if options.seeds > 1:
            student_t(1)  # fails now rather than after hours
        rows = fill(cells, options.experiment)
    except ConfigurationError as error:
        print(f"compare_methods: error: {error}", file=sys.stderr)
        return 2
    folder = Path("lightning_logs") / options.experiment
    text = write_markdown(rows, methods, [pair.stem for pair in options.data], options.baseline)
    (folder / "table.csv").write_text(write_csv(rows), encoding="utf-8")
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(f"\nAccuracy of the last weights on the target's test images; no target label was used.\n\n{text}")
    print(f"{time.monotonic() - start:.0f} s. {folder / 'table.md'}, {folder / 'table.csv'}; to see the runs:")
    print(f"    tensorboard --logdir {folder}")
    failed = [row for row in rows if row["status"] != "finished"]
    if failed:
        print(f"{len(failed)} of {len(rows)} cells failed; the same command tries them again.", file=sys.stderr)
        if any("does not exist" in row["status"] for row in failed):
            print("The digits are written by `python scripts/prepare_digits.py`.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
