"""The demo: from MNIST to two other kinds of digits, without a label of theirs.

Trains every method on every pair with the configurations under ``experiments/``, same budget and seed for each, and
prints and writes a table of the target-test accuracy of the last weights. No target label chooses anything.

    python experiments/demo.py [--seed 0] [--methods source_only dann dan] [--pairs mnist_to_optdigits mnist_to_mnist_m]
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml

import framework
from framework.errors import ConfigurationError

HERE = Path(__file__).resolve().parent
METHODS = ["source_only", "dann", "dan"]
PAIRS = ["mnist_to_optdigits", "mnist_to_mnist_m"]


class Progress(L.Callback):
    """A line that says how far the run is."""

    def __init__(self, title: str) -> None:
        self.title, self.start = title, time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rewrite the line; where the output is no terminal, print one at the end only."""
        done, planned = trainer.current_epoch + 1, trainer.max_epochs or 1
        seconds = time.monotonic() - self.start
        accuracy = float(trainer.callback_metrics.get("val/source_accuracy", float("nan")))
        line = f"{self.title}: epoch {done} of {planned}, {seconds:.0f} s, source validation {accuracy:.1%}"
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if done == planned else "", flush=True)
        elif done == planned:
            print(line, flush=True)


def read(method: str, pair: str) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Class name and arguments of the model, arguments of the data, arguments of the Trainer.

    Composes the two files as the command line does: what the pair's file says wins.
    """
    chosen = yaml.safe_load((HERE / "methods" / f"{method}.yaml").read_text(encoding="utf-8"))["model"]
    configuration = yaml.safe_load((HERE / "data" / f"{pair}.yaml").read_text(encoding="utf-8"))
    model = chosen.get("init_args", {}) | configuration.get("model", {}).get("init_args", {})
    return chosen["class_path"], model, configuration["data"]["init_args"], configuration.get("trainer", {})


def train(method: str, pair: str, seed: int, experiment: str, **options: Any) -> tuple[float, float]:
    """Train a method on a pair; the accuracy of the last weights on the target's test images, and seconds."""
    start = time.monotonic()
    L.seed_everything(seed, verbose=False)
    class_name, model_options, data_options, trainer_options = read(method, pair)
    data = framework.DomainPairDataModule(**data_options)
    model = getattr(framework, class_name)(data.num_classes, **model_options)
    trainer = framework.Trainer(
        experiment=f"{experiment}/{pair}/{method}",
        enable_progress_bar=False,
        callbacks=[Progress(f"{pair}, {method}, seed {seed}")],
        **(trainer_options | options),
    )
    trainer.fit(model, data)
    (scores,) = trainer.test(model, data, verbose=False)
    return scores["test/accuracy"], time.monotonic() - start


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| target | method | target-test accuracy | gain over source-only | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    baseline = {row["pair"]: row["accuracy"] for row in rows if row["method"] == "source_only"}
    for row in rows:
        gain = row["accuracy"] - baseline.get(row["pair"], float("nan"))
        target = row["pair"].split("_to_", 1)[1]
        lines.append(
            f"| {target} | {row['method']} | {100 * row['accuracy']:.1f} % | {100 * gain:+.1f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="files in experiments/methods")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="PAIR", help="files in experiments/data")
    parser.add_argument("--experiment", default="demo", help="folder of the runs below lightning_logs")
    parser.add_argument("--epochs", type=int, help="epochs of each run; default: what the pair's file says")
    chosen = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    options = {"max_epochs": chosen.epochs} if chosen.epochs else {}
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    print(f"{len(chosen.methods)} methods x {len(chosen.pairs)} targets, some minutes on two cores. The runs so far:")
    print(f"    tensorboard --logdir {Path('lightning_logs') / chosen.experiment}\n", flush=True)
    try:
        for pair in chosen.pairs:
            for method in chosen.methods:
                accuracy, seconds = train(method, pair, chosen.seed, chosen.experiment, **options)
                rows.append({"pair": pair, "method": method, "accuracy": accuracy, "seconds": seconds})
    except (ConfigurationError, FileNotFoundError) as error:
        print(f"demo: error: {error}\nHave you run `python scripts/prepare_digits.py`?", file=sys.stderr)
        return 2
    text = table(rows)
    path = Path("lightning_logs") / chosen.experiment / f"table_seed_{chosen.seed}.md"
    path.write_text(text + "\n", encoding="utf-8")
    print(f"\nSource: 3,600 labelled MNIST digits. Seed {chosen.seed}, last weights, no target label used.\n\n{text}\n")
    print(f"{time.monotonic() - start:.0f} s in all. The table is in {os.path.relpath(path)}; to see the runs:")
    print(f"    tensorboard --logdir {Path('lightning_logs') / chosen.experiment}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
