"""Knowledge fusion: one network out of several checkpoints, chosen by held-out accuracy.

    python experiments/fuse.py wise_ft --start probe/checkpoints/best.ckpt --end run/checkpoints/best.ckpt
    python experiments/fuse.py soup run_0/checkpoints/best.ckpt run_1/checkpoints/best.ckpt --kind greedy
    python experiments/fuse.py ensemble run_0/checkpoints/best.ckpt run_1/checkpoints/best.ckpt

Held-out images are the validation images of the run that the checkpoint is from: its data with its options and its
seed, so the same split; a changed split is an error. ``--data`` and the other flags win over what the checkpoint says.

The result is a new run below ``lightning_logs/<experiment>``: ``framework test --run DIR`` and ``framework predict
--run DIR`` work on it. It holds ``checkpoints/last.ckpt``, ``config.yaml``, ``fusion.yaml`` (what it is made of) and
the table as ``table.csv`` and ``table.md``. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

import framework
from framework import fusion
from framework.datamodules.image_folder import ImageFolderDataModule
from framework.errors import ConfigurationError
from framework.loggers import TensorBoardRun
from framework.modules.members import Checkpoint, read_checkpoint, rebuild, trained_on

# what may differ from the run's own: flag, type, and what it is
DATA_FLAGS: dict[str, tuple[type, str]] = {
    "image_size": (int, "height and width that the network sees"),
    "resize_size": (int, "square that images are resized to before a crop"),
    "val_fraction": (float, "share of the training images held out"),
    "test_fraction": (float, "share of one folder held out for test"),
    "seed": (int, "seed of the split"),
    "eval_batch_size": (int, "images per step"),
    "num_workers": (int, "loader processes"),
}
CACHE = 2**30  # bytes of held-out images kept in memory, so that they are decoded once
Row = dict[str, Any]


# ---------------------------------------------------------------------- held-out images
class HeldOut(ImageFolderDataModule):
    """The validation images of a run, or its training images for the batch norms, served as a test: every classifier
    has one, and ``test`` changes nothing."""

    def __init__(self, options: dict[str, Any], split: dict[str, Any] | None, training: bool = False) -> None:
        super().__init__(**options)
        self.options, self.split, self.training = options, split, training
        self.batches: Any = None

    def _scan(self, stage: str) -> None:
        super()._scan("fit" if self.training else "validate")

    def setup(self, stage: str) -> None:
        """Find the images, and refuse another split than the run's."""
        super().setup(stage)
        if self.split is not None:
            self.load_state_dict(self.split)

    def test_dataloader(self) -> Any:
        """The images; those that fit in memory are kept there."""
        if self.training:
            return self.train_dataloader()
        if 3 * self.image_size**2 * len(self.val_files) > CACHE:
            return self.val_dataloader()
        if self.batches is None:
            self.batches = list(self.val_dataloader())
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)


class BatchNormStatistics(L.Callback):
    """Estimates the statistics of all batch norms anew, as the plain mean over the batches of a test loop.

    As at the end of stochastic weight averaging (Izmailov et al., UAI 2018), but that all else stays in evaluation
    mode, in which the network is used.
    """

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the old ones."""
        self.momenta = {}
        for module in pl_module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                self.momenta[module] = module.momentum
                module.reset_running_stats()
                module.momentum = None  # the mean of all batches
                module.train()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the modules back."""
        for module, momentum in self.momenta.items():
            module.momentum = momentum
            module.eval()


def data_options(checkpoint: Checkpoint, file: str, root: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Options of the datamodule: the checkpoint's, else those of its run's ``config.yaml``; flags win."""
    known = known_options()
    written = checkpoint.get("datamodule_hyper_parameters")
    configuration = Path(file).resolve().parent.parent / "config.yaml"
    if written is None and configuration.is_file():
        content = yaml.safe_load(configuration.read_text(encoding="utf-8"))
        written = (content.get("data") or {}).get("init_args")
    options = {key: value for key, value in (written or {}).items() if key in known and not key.startswith("_")}
    images = trained_on(checkpoint)
    if images is not None:  # where the options leave it to the network
        options = {**images.plain(), **{key: value for key, value in options.items() if value is not None}}
    if options.get("seed") is None and (split := split_of(checkpoint)) is not None:
        options["seed"] = split["seed"]  # that of `seed_everything`
    options |= {key: value for key, value in flags.items() if value is not None}
    if root is not None:
        options["root"] = root
    if options.get("root") is None:
        raise ConfigurationError(
            f"Expected `--data` to be a folder of labelled images, but got none, and '{file}' does not say on which "
            "it was trained."
        )
    return options


def known_options() -> set[str]:
    """The options of the datamodule; a checkpoint of another one may have more."""
    bases = ImageFolderDataModule.__mro__
    own: list[Any] = [base for base in bases if base.__module__.startswith("framework") and "__init__" in vars(base)]
    return {name for base in own for name in inspect.signature(base.__init__).parameters} - {"self", "options"}


def split_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What a checkpoint says of the split that its run was trained on."""
    state = checkpoint.get("ImageFolderDataModule")
    return state if isinstance(state, dict) else None


class Judge:
    """Measures networks on the held-out images of a task.

    Args:
        options: of the datamodule.
        split: of the run, to be recognised.
        recompute_batch_norm: whether :meth:`estimate` does anything.
    """

    def __init__(self, options: dict[str, Any], split: dict[str, Any] | None, recompute_batch_norm: bool) -> None:
        self.data = HeldOut(options, split)
        self.training = HeldOut(options, split, training=True) if recompute_batch_norm else None

    def accuracy(self, module: L.LightningModule) -> float:
        """Share of held-out images that are classified right."""
        (scores,) = _trainer().test(module, self.data, verbose=False)
        return float(scores["test/accuracy"])

    def estimate(self, module: L.LightningModule) -> None:
        """Batch-norm statistics on one pass over the training images, augmented as in training."""
        if self.training is not None:
            _trainer(callbacks=[BatchNormStatistics()]).test(module, self.training, verbose=False)


def _trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "devices": 1}
    return framework.Trainer(**quiet, inference_mode=False, **options)


# ---------------------------------------------------------------------- the three ways
def wise_ft(options: argparse.Namespace) -> Path:
    """Interpolate between two checkpoints, and choose the coefficient by held-out accuracy."""
    start, end = read_checkpoint(options.start, "--start"), read_checkpoint(options.end, "--end")
    different = fusion.different_classes(start, end)
    fusion.check_checkpoints([start, end], [options.start, options.end], heads=different is None)
    if different is not None:
        print(
            f"The {different[0]} is {different[1]!r} in --start and {different[2]!r} in --end: backbone and bottleneck "
            "are interpolated, and each task keeps its own head."
        )
    alphas = sorted(set(options.alphas))
    for alpha in alphas:
        fusion.check_alpha(alpha)
    task = judge(options, end, options.end, options.data)
    networks = {"accuracy": rebuild(end, options.end)}
    judges = {"accuracy": task}
    if options.source_data is not None:
        judges["source_accuracy"] = judge(options, start, options.start, options.source_data)
        networks["source_accuracy"] = rebuild(start, options.start)
    rows: list[Row] = []
    for alpha in alphas:
        row: Row = {"alpha": alpha}
        for name, network in networks.items():
            state = _interpolated(start, end, alpha, end if name == "accuracy" else start, different is not None)
            network.load_state_dict(state)
            if 0 < alpha < 1:  # the end points stay what they are
                judges[name].estimate(network)
            row[name] = judges[name].accuracy(network)
        rows.append(row)
        source = f", source task {row['source_accuracy']:.1%}" if "source_accuracy" in row else ""
        print(f"[{len(rows)}/{len(alphas)}] alpha {alpha:g}: new task {row['accuracy']:.1%}{source}", flush=True)
    chosen = max(rows, key=_preference)
    print(f"Chosen: alpha {chosen['alpha']:g}, {RULE}.")
    network, alpha = networks["accuracy"], float(chosen["alpha"])
    state = _interpolated(start, end, alpha, end, different is not None)
    if options.recompute_batch_norm and 0 < alpha < 1:
        network.load_state_dict(state)
        task.estimate(network)
        state = network.state_dict()
    provenance = {
        "method": "wise_ft",
        "files": [str(options.start), str(options.end)],
        "alpha": alpha,
        "heads": "interpolated" if different is None else "of each task",
        "recompute_batch_norm": options.recompute_batch_norm,
        "scores": rows,
    }
    return publish(options, fusion.fused(end, state, provenance), end, task.data, rows)


RULE = (
    "with the best held-out accuracy on the new task; of equal ones the best on the source task, then the one nearest "
    "to 0.5"
)


def _preference(row: Row) -> tuple[float, float, float, float]:
    return row["accuracy"], row.get("source_accuracy", 0.0), -abs(row["alpha"] - 0.5), -row["alpha"]


def _interpolated(
    start: Checkpoint, end: Checkpoint, alpha: float, task: Checkpoint, own_head: bool
) -> dict[str, torch.Tensor]:
    first, second = start["state_dict"], end["state_dict"]
    if not own_head:
        return fusion.interpolate(first, second, alpha)
    mixed = fusion.interpolate(fusion.shared(first), fusion.shared(second), alpha)
    return {**task["state_dict"], **mixed}


def soup(options: argparse.Namespace) -> Path:
    """Average checkpoints, all of them or those that do not lower the held-out accuracy."""
    checkpoints = _read_all(options.checkpoints)
    first, files = checkpoints[0], [str(file) for file in options.checkpoints]
    fusion.check_checkpoints(checkpoints, files)
    task, network = judge(options, first, files[0], options.data), rebuild(first, files[0])
    states = [checkpoint["state_dict"] for checkpoint in checkpoints]

    def load(state: fusion.State) -> None:
        network.load_state_dict(state)

    rows: list[Row] = []
    for file, state in zip(files, states, strict=True):
        load(state)
        rows.append({"file": file, "accuracy": task.accuracy(network), "in_soup": True, "soup_accuracy": ""})
        print(f"[{len(rows)}/{len(files)}] {file}: {rows[-1]['accuracy']:.1%}", flush=True)

    def score(state: fusion.State) -> float:
        load(state)
        task.estimate(network)
        return task.accuracy(network)

    if options.kind == "uniform":
        state, chosen = fusion.average(states), list(range(len(files)))
        accuracy = score(state)
        rows[-1]["soup_accuracy"] = accuracy
    else:

        def tried(state: fusion.State) -> float:
            value = score(state)
            print(f"    the soup with one more: {value:.1%}", flush=True)
            return value

        made = fusion.greedy_soup(states, [row["accuracy"] for row in rows], tried)
        state, chosen, accuracy = made.state, made.ingredients, made.accuracy
        for index, value in made.trials:
            rows[index] |= {"in_soup": index in chosen, "soup_accuracy": value}
        rows = [rows[index] for index, _ in made.trials]
    if options.recompute_batch_norm and len(chosen) > 1:
        load(state)
        task.estimate(network)
        state = network.state_dict()
    print(f"The soup of {len(chosen)} of {len(files)}: {accuracy:.1%} of the held-out images.")
    provenance = {
        "method": f"{options.kind}_soup",
        "files": [files[index] for index in chosen],
        "recompute_batch_norm": options.recompute_batch_norm,
        "accuracy": accuracy,
        "scores": rows,
    }
    return publish(options, fusion.fused(first, state, provenance), first, task.data, rows)


def ensemble(options: argparse.Namespace) -> Path:
    """Put checkpoints into one that predicts their mean."""
    checkpoints, files = _read_all(options.checkpoints), [str(file) for file in options.checkpoints]
    first = checkpoints[0]
    network = framework.PredictionEnsemble(
        int(first["hyper_parameters"]["num_classes"]),
        members=files,
        average=options.average,
        resize_for_members=options.resize_for_members,
    )
    task = judge(options, first, files[0], options.data)
    rows: list[Row] = []
    for index, file in enumerate(files):
        alone = framework.PredictionEnsemble(
            network.num_classes, members=[file], resize_for_members=options.resize_for_members
        )
        alone.preprocessing = network.preprocessing  # the same images for all
        rows.append({"file": file, "accuracy": task.accuracy(alone)})
        print(f"[{index + 1}/{len(files)}] {file}: {rows[-1]['accuracy']:.1%}", flush=True)
    rows.append({"file": "ensemble", "accuracy": task.accuracy(network)})
    print(f"The ensemble of {len(files)}: {rows[-1]['accuracy']:.1%} of the held-out images.")
    provenance = {"method": "ensemble", "files": files, "average": options.average, "scores": rows}
    return publish(options, fusion.checkpoint_of(network, checkpoints, provenance), first, task.data, rows)


def _read_all(paths: Sequence[str]) -> list[Checkpoint]:
    return [read_checkpoint(path, "CHECKPOINT") for path in paths]


def judge(options: argparse.Namespace, checkpoint: Checkpoint, file: str, root: str | None) -> Judge:
    """What measures a task, on the data of the run that a checkpoint is from."""
    flags = {name: getattr(options, name) for name in DATA_FLAGS}
    return Judge(
        data_options(checkpoint, str(file), root, flags),
        split_of(checkpoint),
        getattr(options, "recompute_batch_norm", False),
    )


# ---------------------------------------------------------------------- what is left behind
def publish(
    options: argparse.Namespace, checkpoint: Checkpoint, template: Checkpoint, data: HeldOut, rows: list[Row]
) -> Path:
    """A new run with the checkpoint, its configuration, what it is made of and the table."""
    checkpoint["datamodule_hyper_parameters"] = data.options
    hyperparameters = checkpoint["hyper_parameters"]
    arguments = {k: v for k, v in hyperparameters.items() if k != "num_classes" and not k.startswith("_")}
    seed = data.seed
    configuration = {
        "seed_everything": seed,
        "model": {"class_path": hyperparameters["_class_path"], "init_args": arguments},
        "data": {"class_path": "ImageFolderDataModule", "init_args": data.options},
    }
    run = TensorBoardRun("lightning_logs", options.experiment)
    folder = Path(run.root_dir) / f"version_{run.version}"  # made, and so this run's own
    try:
        files = {
            "config.yaml": yaml.safe_dump(configuration, sort_keys=False),
            "fusion.yaml": yaml.safe_dump(checkpoint["fusion"], sort_keys=False),
            "table.csv": write_csv(rows),
            "table.md": write_markdown(rows),
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        fusion.write_checkpoint(checkpoint, folder / "checkpoints" / "last.ckpt")
        if options.output is not None:
            fusion.write_checkpoint(checkpoint, Path(options.output))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def write_csv(rows: list[Row]) -> str:
    """One line a row, under the names of the first one's columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_markdown(rows: list[Row]) -> str:
    """The same as a table, accuracies in per cent."""

    def shown(key: str, value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{100 * value:.1f}" if key.endswith("accuracy") else f"{value:g}"
        return str(value)

    head = [f"{key.replace('_', ' ')}{', %' if key.endswith('accuracy') else ''}" for key in rows[0]]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(shown(key, value) for key, value in row.items())} |" for row in rows]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """The options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{wise_ft,soup,ensemble}")

    def command(name: str, function: Callable[[argparse.Namespace], Path]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__, allow_abbrev=False)
        added.set_defaults(function=function)
        return added

    interpolation = command("wise_ft", wise_ft)
    interpolation.add_argument("--start", required=True, metavar="CKPT", help="say, a linear probe on the backbone")
    interpolation.add_argument("--end", required=True, metavar="CKPT", help="the run that was fine-tuned from it")
    interpolation.add_argument(
        "--alphas",
        nargs="+",
        type=float,
        default=[i / 10 for i in range(11)],
        metavar="ALPHA",
        help="0 is --start, 1 is --end; default: 0 0.1 … 1",
    )
    interpolation.add_argument("--source_data", metavar="ROOT", help="images of the task of --start, measured too")
    mean = command("soup", soup)
    mean.add_argument("--kind", choices=("uniform", "greedy"), default="greedy")
    several = command("ensemble", ensemble)
    several.add_argument("--average", choices=("probabilities", "logits"), default="probabilities")
    several.add_argument(
        "--resize_for_members", action="store_true", help="bring images to the size that each member was trained on"
    )
    for added in (mean, several):
        added.add_argument("checkpoints", nargs="+", metavar="CKPT")
    for added in (interpolation, mean):
        added.add_argument(
            "--recompute_batch_norm",
            action="store_true",
            help="estimate batch-norm statistics of mixed weights anew, on the training images",
        )
    for added in (interpolation, mean, several):
        added.add_argument("--data", metavar="ROOT", help="folder of labelled images; default: the run's own")
        added.add_argument("--experiment", default="fusion", help="folder below lightning_logs")
        added.add_argument("--output", metavar="CKPT", help="write the checkpoint there too, as a new file")
        for name, (kind, text) in DATA_FLAGS.items():
            added.add_argument(f"--{name}", type=kind, help=f"{text}; default: the run's own")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Fuse; 2 for a user's mistake."""
    options = build_parser().parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    start = time.monotonic()
    try:
        if options.output is not None and Path(options.output).exists():  # now rather than at the end
            raise ConfigurationError(f"Expected `--output` to be a new file, but '{options.output}' exists.")
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", ".*LeafSpec.*", "(?s).*removed in v5.*"):
                warnings.filterwarnings("ignore", message=message)
            folder = options.function(options)
    except ConfigurationError as error:
        print(f"fuse: error: {error}", file=sys.stderr)
        return 2
    shown = os.path.relpath(folder)
    print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}")
    print(f"{time.monotonic() - start:.0f} s. To test it:\n    framework test --run {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
