"""Self-supervision: what pre-training without labels, and the same tasks as terms of an adaptation, are worth.

    python scripts/prepare_digits.py && python experiments/self_supervision.py digits
    python scripts/prepare_solar_cells.py && python scripts/prepare_lite0_weights.py
    python experiments/self_supervision.py solar

``digits``: rotation prediction on the training images of source and target, then source-only from there; rotation as a
term of an adaptation; the best methods without and with it. ``solar``: tasks on all cells, without labels and from
scratch, then a linear probe with a tenth of the labels, against ImageNet's features, random ones, and a network that
learns from these labels alone.

``{pretrained}`` in a method of ``--methods`` stands for the checkpoints of the pre-training, one a seed; with several
tasks it is a method for each. ``NAME:option=value,data.option=value`` of ``--tasks`` changes options of the task's
model and, with the prefix, of its data. Other tasks as terms: ``--methods no_alignment jigsaw masking
"rotation:terms={dan: 1, jigsaw: 1},term_options={jigsaw: {grid: 2}}"``.

The comparison is that of experiments/compare_methods.py. What is finished is not run again; a pre-training is known by
what it depends on (task, options, images), and begins anew where it was interrupted. The table is written to
``lightning_logs/<experiment>``: scores of the last weights on test images, no label of which has chosen anything.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import compare_methods
import lightning.pytorch as L
import yaml
from comparison_table import Row, read_csv, write_csv, write_markdown
from solar_cells import SCRATCH

import framework
from framework.errors import ConfigurationError

HERE = Path(__file__).resolve().parent
UNLABELLED = "UnlabelledFolderDataModule"
START = "init_from={pretrained}"
RANDOM = "frozen:weights=none"  # what a probe can do with features that learned nothing
NAMES = {SCRATCH: "from scratch", RANDOM: "random features", "frozen": "ImageNet features"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "data": ["mnist_to_mnist_m", "mnist_to_optdigits"],
        "unlabelled": ["mnist_and_mnist_m", "mnist_and_optdigits"],
        "tasks": ["rotation_prediction"],
        "methods": [
            "source_only",
            f"source_only:{START}",
            "no_alignment",
            "rotation",
            "mcc",
            "mcc_rotation",
            "dan",
            "dan_rotation",
        ],
        "baselines": ["source_only", "no_alignment"],
        "score": "accuracy",
        "labels_per_class": None,
    },
    "solar": {
        "data": ["solar_cells_poly"],
        "unlabelled": ["solar_cells_unlabelled"],
        # the crops of the data's file are so alike that two views would hardly differ
        "tasks": ["simclr:data.crop=random_resized,data.crop_scale=[0.3, 1.0]", "masked_image_reconstruction"],
        "methods": [SCRATCH, RANDOM, "frozen", f"{RANDOM},{START}"],
        "baselines": [SCRATCH, RANDOM],
        "score": "mean_class_accuracy",
        "labels_per_class": ["0.1"],
    },
}


# ---------------------------------------------------------------------- pre-training
def pretraining(task: str, data: Path, epochs: int | None) -> compare_methods.Cell:
    """What a pre-training depends on but for its seed: the task's file, then the data's, then what was given here."""
    name, _, overrides = task.partition(":")
    own, given = compare_methods.read(HERE / "pretraining" / f"{name}.yaml"), compare_methods.read(data)
    kind = given.get("data", {}).get("class_path")
    if kind != UNLABELLED:
        raise ConfigurationError(
            f"Expected `--unlabelled` to name files as in experiments/data, with `data.class_path` {UNLABELLED}, but "
            f"'{data}' has {kind!r}."
        )
    model, images = (
        own[key].get("init_args", {}) | given.get(key, {}).get("init_args", {}) for key in ("model", "data")
    )
    for option, value in (item.split("=", 1) for item in compare_methods.option_items(overrides)):
        part = images if option.startswith("data.") else model
        part[option.removeprefix("data.")] = yaml.safe_load(value)
    trainer = own.get("trainer", {}) | given.get("trainer", {}) | ({"max_epochs": epochs} if epochs else {})
    return compare_methods.Cell(name, data.stem, 0, own["model"]["class_path"], model, images, trainer, UNLABELLED)


def pretrained(task: str, data: Path, options: argparse.Namespace) -> str:
    """Pre-train with every seed with which that is not done yet; the path of the checkpoints, with ``{seed}`` in it."""
    cell = pretraining(task, data, options.pretraining_epochs)
    home = f"{options.experiment}/pretraining/{cell.method}/{data.stem}_{cell.key(compare_methods.folder_digest)}"
    paths = [Path("lightning_logs") / home / f"seed_{seed}.ckpt" for seed in range(options.seeds)]
    clock = compare_methods.Clock(sum(not path.exists() for path in paths))
    for seed, path in enumerate(paths):
        if path.exists():
            continue
        start = time.monotonic()
        progress = compare_methods.Progress(f"{cell.method}, {data.stem}, seed {seed}", clock)
        L.seed_everything(seed, verbose=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            images = framework.UnlabelledFolderDataModule(**copy.deepcopy(cell.data))
            module = getattr(framework, cell.class_name)(**copy.deepcopy(cell.model))
            trainer = framework.Trainer(
                experiment=f"{home}/seed_{seed}", enable_progress_bar=False, callbacks=[progress], **cell.trainer
            )
            trainer.fit(module, images)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        shutil.copy(Path(trainer.log_dir or ".") / "checkpoints" / "last.ckpt", partial)
        partial.replace(path)  # so that only a finished run has its checkpoint here
        clock.done(time.monotonic() - start)
    return f"lightning_logs/{home}/seed_{{seed}}.ckpt"


# ---------------------------------------------------------------------- comparison
def named(options: argparse.Namespace, images: Path) -> dict[str, str]:
    """The methods of a comparison, with the names that the table has for them; pre-trains for those that ask for it."""
    checkpoints, names = dict[str, str](), dict[str, str]()
    short = [task.partition(":")[0] for task in options.tasks]
    for method in options.methods:
        if START not in method:
            names[method] = NAMES.get(method, method)
            continue
        for task in options.tasks:
            if task not in checkpoints:
                checkpoints[task] = pretrained(task, images, options)
            name, _, overrides = method.partition(":")
            rest = [i for i in compare_methods.option_items(overrides) if i not in (START, "weights=none")]
            name += f":{','.join(rest)}" if rest else ""
            stem = task.partition(":")[0]
            shown = stem if short.count(stem) == 1 else task
            names[method.replace("{pretrained}", checkpoints[task])] = f"{shown}, then {name}"
    return names


def compare(data: Path, names: dict[str, str], options: argparse.Namespace, score: str) -> tuple[int, list[Row]]:
    """Run a comparison; its exit code and its rows, with the names of the table."""
    words = ["--data", str(data), "--methods", *names, "--baseline", next(iter(names)), "--score", score]
    words += ["--experiment", options.experiment, "--seeds", str(options.seeds)]
    words += ["--epochs", str(options.epochs)] if options.epochs else []
    words += ["--labels_per_class", *options.labels_per_class] if options.labels_per_class else []
    code = compare_methods.main(words)
    if code == 2:
        raise ConfigurationError("Expected a comparison that can be run; see above.")
    rows = read_csv(Path("lightning_logs") / options.experiment / "table.csv")
    # other things may have run beside: no times
    return code, [row | {"method": names[row["method"]], "seconds_per_step": ""} for row in rows]


def build_parser() -> argparse.ArgumentParser:
    """The options: the same of both experiments, with other defaults."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, default in DEFAULTS.items():
        command = commands.add_parser(name, allow_abbrev=False)
        for flag, text in (
            ("data", "as in experiments/data"),
            ("unlabelled", "of pre-training, one for each of --data"),
        ):
            files = [HERE / "data" / f"{stem}.yaml" for stem in default[flag]]
            command.add_argument(f"--{flag}", nargs="+", type=Path, default=files, metavar="YAML", help=text)
        command.add_argument(
            "--tasks",
            nargs="+",
            default=default["tasks"],
            metavar="NAME",
            help="files of experiments/pretraining, with options",
        )
        command.add_argument(
            "--methods", nargs="+", default=default["methods"], metavar="NAME", help="as of compare_methods.py"
        )
        command.add_argument("--labels_per_class", nargs="+", default=default["labels_per_class"], metavar="N")
        command.add_argument("--seeds", type=int, default=3, help="number of seeds, 0 to SEEDS - 1")
        command.add_argument("--epochs", type=int, help="of each run of the comparison; default: as --data says")
        command.add_argument("--pretraining_epochs", type=int, help="default: as --unlabelled, or else the task, says")
        command.add_argument("--experiment", default=f"self_supervision_{name}", help="folder below lightning_logs")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the table; 1 where a run of the comparison failed."""
    options = build_parser().parse_args(arguments)
    default = DEFAULTS[options.command]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    codes, rows = [], list[Row]()
    try:
        if options.seeds < 1 or (options.pretraining_epochs is not None and options.pretraining_epochs < 1):
            raise ConfigurationError("Expected `--seeds` and `--pretraining_epochs` to be 1 or more.")
        if len(options.data) != len(options.unlabelled):
            raise ConfigurationError(
                f"Expected as many files of `--unlabelled` as of `--data`, but got {len(options.unlabelled)} and "
                f"{len(options.data)}."
            )
        for data in options.data:  # before hours of pre-training
            options.methods = compare_methods.chosen_methods(options.methods, compare_methods.data_class(data))
        for data, images in zip(options.data, options.unlabelled, strict=True):
            code, found = compare(data, named(options, images), options, default["score"])
            codes.append(code)
            rows += found
        methods, pairs = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "pair"))
        baselines = [name for name in (NAMES.get(name, name) for name in default["baselines"]) if name in methods]
        text = write_markdown(rows, methods, pairs, baselines, default["score"])
    except ConfigurationError as error:
        print(f"self_supervision: error: {error}", file=sys.stderr)
        return 2
    folder = Path("lightning_logs") / options.experiment
    (folder / "table.csv").write_text(write_csv(rows), encoding="utf-8")
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{folder / 'table.md'}, {folder / 'table.csv'}")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
