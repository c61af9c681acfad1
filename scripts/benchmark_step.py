"""Time and memory of a training step under the Trainer, as ratios to loops without it in the same run.

Parts, both by default:

- ``steps``: a method's step under the Trainer, default logging on, beside the loop that one would write by hand for the
  same method (scripts/hand_written.py), the bare step that all methods contain (one forward of both domains,
  cross-entropy, backward), and pytorch-adapt's where it imports (scripts/peers.py). The loops written by hand must
  compute the method's own loss, or the benchmark stops.
- ``overhead``: what the Trainer adds to a hand-written step, in milliseconds, on a network that takes no time.

Steps take turns: after each step of the Trainer the other forms take one; on a GPU after each ``--block`` of steps, so
that it is waited for between blocks alone. A step of the Trainer is all that happens between them: fetching the batch,
hooks, callbacks, progress bar and loggers too. The batch is on the device already.

    python scripts/benchmark_step.py [--parts steps] [--methods all] [--threads 2] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hand_written
import lightning.pytorch as L
import peers
import torch
import yaml
from measuring import (
    DEVICE,
    high_water,
    in_own_process,
    in_words,
    machine,
    milliseconds,
    number,
    spread,
    synchronize,
    table,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import framework
from framework.batch import DomainBatch, LabelledBatch
from framework.datamodules.datasets import whole
from framework.networks import Preprocessing

METHODS = Path(__file__).resolve().parents[1] / "experiments" / "methods"
TRAINER, HAND, TWO, BARE = "this project's Trainer", "hand-written", "hand-written, two forwards", "bare step"
PEER = "pytorch-adapt"
OPTIONS = {  # of the methods, beside their files: all pairs of a batch, and no dropout, so that losses can be compared
    "dan": {"estimator": "unbiased", "bottleneck_dropout": 0.0}
}
Step = Callable[[DomainBatch], Tensor]


class OneBatch(L.LightningDataModule):
    """Serves the same batch again and again."""

    def __init__(self, batch: Any, steps: int) -> None:
        super().__init__()
        self.batch, self.steps = batch, steps

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """It is there already."""
        return batch

    def train_dataloader(self) -> DataLoader[Any]:
        """The batch, ``steps`` times."""
        return DataLoader([self.batch] * self.steps, batch_size=None, collate_fn=whole)


class TakingTurns(L.Callback):
    """Times the Trainer's steps, and as many of each other form after them.

    Args:
        forms: the other forms.
        warm_up: steps that do not count.
        same: those of them that must compute the loss that the Trainer's module does, in the first steps.
        tolerance: relative, of that.
        block: steps of each form in a turn, timed together.
    """

    def __init__(
        self,
        forms: dict[str, Step],
        warm_up: int,
        same: tuple[str, ...] = (),
        tolerance: float = 1e-3,
        block: int = 1,
    ) -> None:
        self.forms, self.warm_up, self.same, self.tolerance, self.block = forms, warm_up, same, tolerance, block
        self.seconds: dict[str, list[float]] = {name: [] for name in (TRAINER, *forms)}
        self.first_losses: list[Tensor] = []
        self.last = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The Trainer's turn may be over. (The last callback: the next step begins after it.)"""
        if batch_idx < 2:
            self.first_losses.append(outputs["loss"].detach().clone())
        if (batch_idx + 1) % self.block:
            return
        synchronize()
        counts = batch_idx >= max(self.block, self.warm_up)
        if counts:
            self.seconds[TRAINER].append((time.perf_counter() - self.last) / self.block)
        for name, form in self.forms.items():
            start = time.perf_counter()
            losses = [form(batch) for _ in range(self.block)]
            synchronize()
            if counts:
                self.seconds[name].append((time.perf_counter() - start) / self.block)
            if name in self.same:
                here = self.first_losses[batch_idx + 1 - self.block :]
                for loss, expected in zip(losses, here, strict=False):
                    torch.testing.assert_close(loss.detach(), expected, rtol=self.tolerance, atol=self.tolerance / 10)
        self.last = time.perf_counter()


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """A temporary folder for the runs, and nothing on the terminal: the progress bar goes where a file would."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            os.chdir(home)


def train(module: Any, batch: Any, steps: int, *callbacks: L.Callback, **options: Any) -> None:
    """A run under the Trainer as the command line has it: TensorBoard, CSV, checkpoints, progress bar."""
    with elsewhere():
        framework.Trainer(max_epochs=1, callbacks=list(callbacks), **options).fit(module, OneBatch(batch, steps))


# ---------------------------------------------------------------- a method's step
def build(method: str, options: argparse.Namespace, **fixed: Any) -> Any:
    """The module that the method's file describes, with the benchmark's backbone."""
    chosen = yaml.safe_load((METHODS / f"{method}.yaml").read_text(encoding="utf-8"))["model"]
    L.seed_everything(0, verbose=False)
    given = {"backbone": options.backbone, "weights": None, **OPTIONS.get(method, {}), **fixed}
    if options.batch_norm:
        given["batch_norm"] = options.batch_norm
    return getattr(framework, chosen["class_path"])(options.classes, **(chosen.get("init_args", {}) | given))


def random_batch(images: int, size: int, classes: int) -> DomainBatch:
    """Noise of two domains, on the device."""
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, images, 3, size, size, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    source, target, labels = source.to(DEVICE), (target + 0.5).to(DEVICE), labels.to(DEVICE)
    return DomainBatch(LabelledBatch(source, labels, torch.zeros_like(labels)), target)


def steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each form of each method."""
    batch = random_batch(options.batch_size, options.image_size, options.classes)
    known = sorted(path.stem for path in METHODS.glob("*.yaml"))
    rows = []
    for method in known if options.methods == ["all"] else options.methods:
        module = build(method, options)
        count, half = options.steps + options.warm_up, options.precision == "bf16-mixed"
        forms: dict[str, Step] = {BARE: hand_written.Bare(module, half)}
        alignment = hand_written.ALIGNMENTS.get(method)
        if alignment is not None and module.batch_norm != "domain_specific":
            two_forwards = module.batch_norm == "separate"
            forms[HAND] = hand_written.Loop(module, alignment, count, two_forwards, half)
            if method == "dann" and not two_forwards:
                forms[TWO] = hand_written.Loop(module, alignment, count, True, half)
        peer = None if options.no_peers else peers.pytorch_adapt(method, module, half)
        if peer is not None:
            forms[PEER] = peer
        tolerance = 3e-2 if half else 1e-3  # the module's losses on features are in float32
        clock = TakingTurns(forms, options.warm_up, (HAND,), tolerance, options.block)
        train(module, batch, count, clock, precision=options.precision)
        found = {name: milliseconds(times) for name, times in clock.seconds.items()}
        for form, figures in found.items():
            peak = None
            if not options.no_memory and form in (TRAINER, HAND) and HAND in found:
                peak = peak_memory(method, form, options)
            row = {"method": method, "form": form, **figures, "peak_mib": peak}
            row["of_hand_written"] = figures["ms"] / found[HAND]["ms"] if HAND in found else None
            row["images_per_second"] = 2e3 * options.batch_size / figures["ms"]
            rows.append({**row, "of_bare": figures["ms"] / found[BARE]["ms"]})
        print(f"{method}: done", file=sys.stderr, flush=True)
    return rows


def peak_memory(method: str, form: str, options: argparse.Namespace) -> float | None:
    """Most MiB that building the networks and some steps hold at once, in a process of its own."""
    names = ("backbone", "image_size", "batch_size", "classes", "precision")
    given = [f"--{name}={getattr(options, name)}" for name in names]
    # memory that is freed goes back at once, or what the allocator keeps would be measured
    printed = in_own_process(__file__, ["--memory_of", method, form, *given], {"MALLOC_MMAP_THRESHOLD_": "65536"})
    return None if printed is None else float(printed)


def print_memory(method: str, form: str, options: argparse.Namespace) -> None:
    """What ``peak_memory`` reads."""
    batch = random_batch(options.batch_size, options.image_size, options.classes)
    # libraries, threads and what is written before the first step are there
    train(build(method, options, backbone="resnet8"), random_batch(2, 8, options.classes), 2)
    before = high_water(reset=True)
    module = build(method, options)
    if form == TRAINER:
        train(module, batch, 5, precision=options.precision)
    else:
        separate, half = module.batch_norm == "separate", options.precision == "bf16-mixed"
        loop = hand_written.Loop(module, hand_written.ALIGNMENTS[method], 5, separate, half)
        del module
        for _ in range(5):
            loop(batch)
    print(high_water() - before)


# ---------------------------------------------------------------- what the Trainer adds
class Tiny(nn.Module):
    """A backbone that takes no time."""

    num_features, preprocessing = 32, Preprocessing()

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, self.num_features)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[N, 32]`` of images ``[N, 3, 4, 4]``."""
        features: Tensor = self.linear(images.flatten(1))
        return features


class Diagnosed(hand_written.Loop):
    """The hand-written loop with the framework's loss: it measures what is logged, too, and logs nothing."""

    def loss(self, batch: DomainBatch) -> Tensor:
        """As the module's."""
        outputs = self.module.outputs(torch.cat([batch.source.images, batch.target]))
        source, target = outputs.split(len(batch.source.images))
        self.module.watch_target(target.logits)
        progress = torch.full((), min(1.0, self.step_number / self.steps), device=DEVICE)
        labels = batch.source.labels
        aligned: Tensor = self.module.alignment(source._replace(labels=labels), target, progress)
        return nn.functional.cross_entropy(source.logits, labels) + self.trade_off * aligned


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds a step over the hand-written loop, for a plain classifier and for DANN."""
    count, rows = options.overhead_steps, []
    domains = random_batch(8, 4, 5)
    for name in ("ImageClassifier", "SourceOnly", "DANN"):
        L.seed_everything(0, verbose=False)
        adversarial = {"discriminator_features": 32} if name == "DANN" else {}
        module = getattr(framework, name)(5, backbone="resnet8", bottleneck_features=16, **adversarial)
        module.backbone, module.bottleneck = Tiny(), nn.Linear(Tiny.num_features, 16)
        method = {"DANN": hand_written.dann}.get(name, hand_written.source_only)
        forms: dict[str, Step] = {HAND: hand_written.Loop(module, method, count)}
        if name == "ImageClassifier":
            forms = {HAND: labelled_only(module)}
        if name == "DANN":
            forms["hand-written, with diagnostics"] = Diagnosed(module, method, count)
        clock = TakingTurns(forms, warm_up=count // 10)
        train(module, domains.source if name == "ImageClassifier" else domains, count, clock)
        found = {form: milliseconds(times) for form, times in clock.seconds.items()}
        for form in forms:
            over = {key: found[TRAINER][key] - found[form][key] for key in ("ms", "mean_ms")}
            rows.append({"module": name, "floor": form, "floor_ms": found[form]["ms"], **over})
    return rows


def labelled_only(module: Any) -> Callable[[Any], Tensor]:
    """The hand-written loop of a classifier."""
    net = copy.deepcopy(module).to(DEVICE).train()
    optimizer = net.optimizer_class(net.parameter_groups(), **(net.optimizer_arguments | {"fused": True}))

    def step(batch: LabelledBatch) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net.head(net.bottleneck(net.backbone(batch.images))), batch.labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


# ---------------------------------------------------------------- output
PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {"steps": steps, "overhead": overhead}


def markdown(result: dict[str, Any], options: argparse.Namespace) -> str:
    """The tables."""
    text = in_words(result["machine"]) + "\n"
    if "steps" in result:
        columns = ["method", "step", "ms", "quartiles", "of hand-written", "of the bare step", "images/s", "peak, MiB"]
        cells = []
        for r in result["steps"]:
            times = [number(r["ms"], 1), spread(r), number(r["of_hand_written"]), number(r["of_bare"])]
            more = [number(r["images_per_second"], 0), number(r["peak_mib"], 0)]
            cells.append([r["method"], r["form"], *times, *more])
        text += f"\n### A method's step: {size(options)}, {options.precision}\n\n{table(columns, cells)}"
    if "overhead" in result:
        columns = ["module", "floor", "floor, ms", "added, ms (medians)", "added, ms (means)"]
        cells = [
            [r["module"], r["floor"], number(r["floor_ms"], 3), number(r["ms"], 3), number(r["mean_ms"], 3)]
            for r in result["overhead"]
        ]
        text += f"\n### What the Trainer adds to a step\n\n{table(columns, cells)}"
    return text


def size(options: argparse.Namespace) -> str:
    """What the steps are of."""
    return f"{options.backbone}, {options.batch_size} + {options.batch_size} images of {options.image_size} px"


def common_options(description: str | None) -> argparse.ArgumentParser:
    """The options of this benchmark and of benchmark_run.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch_norm", help="default: as in the method's file; `separate` is two forward passes")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16, help="of each domain")
    parser.add_argument("--classes", type=int, default=31)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="default: printed only")
    return parser


def prepare(options: argparse.Namespace) -> None:
    """Threads as asked for, and nothing said beside the results."""
    for name in ("lightning.pytorch", "framework"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes that are started


def report(result: dict[str, Any], text: str, options: argparse.Namespace) -> None:
    """Print the tables, and write them where that was asked for."""
    print(text)
    for path, content in ((options.json, json.dumps(result, indent=2) + "\n"), (options.markdown, text)):
        if path is not None:
            path.write_text(content, encoding="utf-8")


def all_options() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = common_options(__doc__)
    block = 1 if DEVICE.type == "cpu" else 10
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--methods", nargs="+", default=["dann", "dan", "cdan", "mcc"], metavar="NAME", help="or `all`")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"], help="in `steps`")
    parser.add_argument("--steps", type=int, default=40, help="of each form of a method")
    parser.add_argument("--warm_up", type=int, default=5)
    parser.add_argument("--block", type=int, default=block, help="steps of a turn in `steps`; default: 1, on a GPU 10")
    parser.add_argument("--overhead_steps", type=int, default=2000)
    parser.add_argument("--no_memory", action="store_true", help="do not start a process for each method and form")
    parser.add_argument("--no_peers", action="store_true", help="without pytorch-adapt")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = all_options().parse_args(arguments)
    prepare(options)
    if options.memory_of:
        print_memory(*options.memory_of, options)
        return 0
    result: dict[str, Any] = {"machine": machine("torch", "torchvision", "lightning", "pytorch-adapt")}
    result |= {part: PARTS[part](options) for part in options.parts}
    report(result, markdown(result, options), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
