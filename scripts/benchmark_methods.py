"""Time of a training step of each method, relative to the bare step that all methods contain.

The bare step is one forward of the concatenated source and target images, cross-entropy of the source's logits, and
backward: no optimizer, no Lightning. After every step of the method, in the same process, a bare step is timed, so that
both see the same machine; the ratio is that of the medians. Data is one batch in memory.

    python scripts/benchmark_methods.py [--methods all] [--steps 30] [--threads 2]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import yaml
from torch.utils.data import DataLoader

import framework
from framework.batch import DomainBatch, LabelledBatch

METHODS = Path(__file__).resolve().parents[1] / "experiments" / "methods"


class OneBatch(L.LightningDataModule):
    """Serves the same batch again and again."""

    def __init__(self, batch: DomainBatch, steps: int) -> None:
        super().__init__()
        self.batch, self.steps = batch, steps

    def train_dataloader(self) -> DataLoader[DomainBatch]:
        """The batch, ``steps`` times."""
        return DataLoader([self.batch] * self.steps, batch_size=None)  # type: ignore[arg-type]


class Interleaved(L.Callback):
    """Times the method's steps, and a bare step after each."""

    def __init__(self, model: Any, warm_up: int) -> None:
        self.model, self.warm_up = model, warm_up
        self.steps: list[float] = []
        self.bare: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """The clock starts once the batch is there."""
        synchronize()
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock; the bare step."""
        synchronize()
        middle = time.perf_counter()
        images = torch.cat([batch.source.images, batch.target])
        for parameter in self.model.parameters():
            parameter.grad = None
        logits = self.model(images)[: len(batch.source.images)]
        torch.nn.functional.cross_entropy(logits, batch.source.labels).backward()
        synchronize()
        if batch_idx >= self.warm_up:
            self.steps.append(middle - self.start)
            self.bare.append(time.perf_counter() - middle)


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(method: str, batch: DomainBatch, options: argparse.Namespace) -> tuple[float, float]:
    """Medians of the method's and the bare step, in seconds."""
    chosen = yaml.safe_load((METHODS / f"{method}.yaml").read_text(encoding="utf-8"))["model"]
    L.seed_everything(0, verbose=False)
    build = getattr(framework, chosen["class_path"])
    fixed = {"backbone": options.backbone, "weights": None}
    if options.batch_norm:
        fixed["batch_norm"] = options.batch_norm
    module = build(options.classes, **(chosen.get("init_args", {}) | fixed))
    width = chosen.get("init_args", {}).get("bottleneck_features", 256)
    bare = framework.SourceOnly(options.classes, backbone=options.backbone, bottleneck_features=width)
    if torch.cuda.is_available():
        bare.cuda()
    clock = Interleaved(bare, options.warm_up)
    trainer = framework.Trainer(
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=50,
    )
    trainer.fit(module, OneBatch(batch, options.steps + options.warm_up))
    return statistics.median(clock.steps), statistics.median(clock.bare)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["all"], metavar="NAME")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm_up", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch_norm", help="default: as in the method's file; `separate` is two forward passes")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16, help="of each domain")
    parser.add_argument("--classes", type=int, default=31)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    known = sorted(path.stem for path in METHODS.glob("*.yaml"))
    names = known if options.methods == ["all"] else options.methods
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    labels = torch.randint(options.classes, (options.batch_size,))
    source = LabelledBatch(torch.randn(shape), labels, torch.zeros_like(labels))
    batch = DomainBatch(source, torch.randn(shape) + 0.5)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.backbone}, {options.image_size} px, {options.batch_size} + {options.batch_size} images, {where}\n")
    print("| method | step, ms | bare step, ms | ratio |\n| --- | --- | --- | --- |", flush=True)
    for name in names:
        step, bare = measure(name, batch, options)
        print(f"| {name} | {1000 * step:.1f} | {1000 * bare:.1f} | {step / bare:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
