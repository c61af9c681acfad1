"""Time of a whole training run, data included, and what the recommended settings for a CPU are worth.

Parts, both by default:

- ``settings``: DANN at 224 px in float32 with torch's defaults, against the settings for a CPU, one after the other.
- ``run``: ``framework fit`` from the image cache, and where its time goes; beside its step without data, and beside
  loaders and loop as published code has them (ImageFolder, Pillow, worker processes, a loop written by hand).

Each figure is the median of processes that take turns.

    python scripts/benchmark_run.py [--parts run] [--turns 3] [--threads 2] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hand_written
import lightning.pytorch as L
import torch
from benchmark_step import (
    METHODS,
    TRAINER,
    TakingTurns,
    build,
    common_options,
    elsewhere,
    prepare,
    random_batch,
    report,
    size,
    train,
)
from measuring import DEVICE, in_own_process, in_words, machine, milliseconds, number, spread, synchronize, table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from framework.batch import DomainBatch, LabelledBatch
from framework.cli import run as framework_command

FOLDERS = [Path("data/solar_cells/mono"), Path("data/solar_cells/poly")]


# ---------------------------------------------------------------- settings for a CPU
PLAIN = {"channels_last": False, "optimizer_options": {"momentum": 0.9, "nesterov": True, "fused": False}}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the module, of the Trainer
    "float32, torch's defaults": (PLAIN, {"keep_memory": False}),
    "+ channels_last and fused optimizer": ({}, {"keep_memory": False}),
    "+ memory kept: this project's defaults": ({}, {}),
    "+ bf16-mixed": ({}, {"precision": "bf16-mixed"}),
}


def settings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each set of settings, DANN at 224 px; each turn is a process of its own."""
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for turn in range(options.turns):
        for name in SETTINGS:
            printed = in_own_process(__file__, ["--setting", name, *same_options(options)])
            times[name].append(float(printed or "nan"))
        print(f"settings, turn {turn + 1} of {options.turns}: done", file=sys.stderr, flush=True)
    found = {name: milliseconds(seconds) for name, seconds in times.items()}
    floor = found[next(iter(SETTINGS))]["ms"]
    return [{"settings": name, **figures, "ratio": figures["ms"] / floor} for name, figures in found.items()]


def same_options(options: argparse.Namespace) -> list[str]:
    """For another process of this script."""
    threads = [f"--threads={options.threads}"] if options.threads else []
    return [*threads, f"--backbone={options.backbone}", f"--batch_size={options.batch_size}"]


def print_setting(name: str, options: argparse.Namespace) -> None:
    """The median of a few steps in seconds, which ``settings`` reads."""
    of_module, of_trainer = SETTINGS[name]
    clock = TakingTurns({}, warm_up=3)
    batch = random_batch(options.batch_size, 224, options.classes)
    train(build("dann", options, **of_module), batch, 11, clock, **of_trainer)
    print(milliseconds(clock.seconds[TRAINER])["ms"] / 1e3)


# ---------------------------------------------------------------- a run of the command line
class RunClock(L.Callback):
    """Where the time of a run goes, from Lightning's profiler and the clock; for one run in a process."""

    found: dict[str, Any]
    warm_up = 5

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A batch is over; a GPU is waited for where the clock starts and stops."""
        if len(self.ends) == self.warm_up - 1 or trainer.is_last_batch:
            synchronize()
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seconds a step, and each action's share of them."""
        count = len(self.ends) - self.warm_up
        seconds = self.ends[-1] - self.ends[self.warm_up - 1]
        durations = trainer.profiler.recorded_durations  # type: ignore[attr-defined]
        shares = {name: sum(times[-count:]) / seconds for name, times in durations.items() if len(times) >= count}
        type(self).found = {"seconds": seconds / count, "shares": shares}


CACHED = "framework fit, cached"
RUNS: dict[str, list[str]] = {
    f"{CACHED}, no workers": ["--data.num_workers=0"],
    f"{CACHED}, 1 thread a domain": ["--data.num_workers=1"],
    f"{CACHED}, 2 threads a domain (the default)": [],
    f"{CACHED}, the default, bf16-mixed": ["--trainer.precision=bf16-mixed"],
}
PUBLISHED = {f"published loaders and loop, {n or 'no'} worker(s) a domain": n for n in (0, 1, 2)}
NO_DATA = {"the Trainer's step without data": "32-true", "the Trainer's step without data, bf16-mixed": "bf16-mixed"}
STEP = "run_training_batch"


def runs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way of training DANN on two folders; each turn is a process of its own."""
    names = [*NO_DATA, *PUBLISHED, *RUNS]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(options.turns):
        for name in names:
            given = [*same_options(options), "--folders", *map(str, options.folders)]
            printed = in_own_process(__file__, ["--run_of", name, *given])
            if printed is not None:
                found[name].append(json.loads(printed))
        print(f"run, turn {turn + 1} of {options.turns}: done", file=sys.stderr, flush=True)
    rows = []
    for name, turns in found.items():
        figures = milliseconds([turn["seconds"] for turn in turns])
        profile = turns[-1].get("shares")
        rows.append({"run": name, **figures, "profile": profile, "step": (profile or {}).get(STEP)})
    return [{**row, "ratio": row["ms"] / rows[0]["ms"]} for row in rows]


def print_run(name: str, options: argparse.Namespace) -> None:
    """Seconds a step and the profile, which ``runs`` reads."""
    folders, count = [str(Path(folder).resolve()) for folder in options.folders], RunClock.warm_up + 30
    if name in RUNS:
        found = command_line(folders, RUNS[name], count, options)
    elif name in NO_DATA:
        module, clock = build("dann", options), TakingTurns({}, warm_up=RunClock.warm_up, block=RunClock.warm_up)
        batch = random_batch(options.batch_size, options.image_size, options.classes)
        train(module, batch, count, clock, precision=NO_DATA[name])
        found = {"seconds": sum(clock.seconds[TRAINER]) / len(clock.seconds[TRAINER])}
    else:
        found = {"seconds": published(folders, PUBLISHED[name], count, options)}
    print(json.dumps(found))


def command_line(folders: list[str], flags: list[str], count: int, options: argparse.Namespace) -> dict[str, Any]:
    """``framework fit`` on the folders."""
    given = {
        "config": METHODS / "dann.yaml",
        "model.backbone": options.backbone,
        "model.weights": "none",
        "data": "DomainPairDataModule",
        "data.source": folders[0],
        "data.target": folders[1],
        "data.cache": "memory",
        "data.batch_size": options.batch_size,
        "data.image_size": options.image_size,
        "data.steps_per_epoch": count,
        "trainer.max_epochs": 1,
        "trainer.limit_val_batches": 0,
        "trainer.profiler": "simple",
        "trainer.callbacks+": "benchmark_run.RunClock",
    }
    with elsewhere():
        if framework_command(["fit", *(f"--{name}={value}" for name, value in given.items()), *flags]) != 0:
            raise SystemExit("`framework fit` failed")
    import benchmark_run  # the command line's copy of this script

    return benchmark_run.RunClock.found


def published(folders: list[str], workers: int, count: int, options: argparse.Namespace) -> float:
    """Seconds a step of ImageFolder with Pillow, loaders that start anew when they end, and a hand-written loop."""
    side = round(options.image_size * 256 / 224)
    steps = [
        transforms.Resize((side, side)),
        transforms.RandomResizedCrop(options.image_size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]

    loading: dict[str, Any] = {"shuffle": True, "drop_last": True, "pin_memory": DEVICE.type == "cuda"}

    def endless(folder: str) -> Iterator[list[Tensor]]:
        data = ImageFolder(folder, transforms.Compose(steps))
        loader = DataLoader(data, options.batch_size, num_workers=workers, **loading)
        while True:
            for images, labels in loader:
                yield [images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)]

    L.seed_everything(0, verbose=False)
    loop = hand_written.Loop(build("dann", options, **PLAIN), hand_written.dann, count)
    source, target = map(endless, folders)
    ends = []
    for _ in range(count):
        (images, labels), (others, _) = next(source), next(target)
        loop(DomainBatch(LabelledBatch(images, labels, torch.zeros_like(labels)), others))
        if len(ends) in (RunClock.warm_up - 1, count - 1):
            synchronize()
        ends.append(time.perf_counter())
    return (ends[-1] - ends[RunClock.warm_up - 1]) / (count - RunClock.warm_up)


# ---------------------------------------------------------------- output
PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {"settings": settings, "run": runs}


def markdown(result: dict[str, Any], options: argparse.Namespace) -> str:
    """The tables."""
    text = in_words(result["machine"]) + "\n"
    if "settings" in result:
        cells = [[r["settings"], number(r["ms"], 0), spread(r), number(r["ratio"])] for r in result["settings"]]
        at_224 = size(argparse.Namespace(**{**vars(options), "image_size": 224}))
        text += f"\n### Settings for a CPU: DANN, {at_224}\n\n"
        text += table(["settings", "ms", "quartiles", "ratio"], cells)
    if "run" in result:
        cells = [
            [r["run"], number(r["ms"], 0), spread(r), number(r["ratio"]), number(r["step"], 3)] for r in result["run"]
        ]
        text += f"\n### A run, data included: DANN, {size(options)}\n\n"
        text += table(["run", "ms a step", "quartiles", "of the step without data", "share in the step"], cells)
        profile = next((r["profile"] for r in result["run"] if r["profile"]), {})
        shares = sorted(profile.items(), key=lambda item: -item[1])[:8]
        text += "\nShares of the first cached run's time (some hold others): "
        text += "; ".join(f"`{name}` {share:.1%}" for name, share in shares) + ".\n"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = common_options(__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--turns", type=int, default=3, help="processes of each setting and run")
    parser.add_argument("--folders", type=Path, nargs=2, default=FOLDERS, help="of source and target")
    for hidden in ("--setting", "--run_of"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    prepare(options)
    if options.setting:
        print_setting(options.setting, options)
        return 0
    if options.run_of:
        print_run(options.run_of, options)
        return 0
    if "run" in options.parts and not all(folder.is_dir() for folder in options.folders):
        parser.error("Expected `--folders` to be two folders of classes; scripts/prepare_solar_cells.py makes them.")
    result: dict[str, Any] = {"machine": machine("torch", "torchvision", "lightning", "pillow")}
    result |= {part: PARTS[part](options) for part in options.parts}
    report(result, markdown(result, options), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
