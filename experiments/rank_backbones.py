"""Rank pretrained backbones for a folder of labelled images before anything is trained, by one feature pass each.

    python experiments/rank_backbones.py --data photos --backbones resnet18 convnext_tiny timm/tf_efficientnet_lite0 \\
        --weights DEFAULT timm/tf_efficientnet_lite0=weights/lite0.pth

``--data`` is a folder as ImageFolderDataModule takes it. The images are those that it would train on, without
augmentation; validation and test images are held out as there, so that the choice of a backbone does not look at them.
Each backbone sees them as it expects to: its own image size, mean and standard deviation.

The scores, all higher where the features fit the task better; see framework/functional/transferability.py. They compare
backbones on one folder, and their values mean nothing between folders.

    LogME    log evidence, per image, of a Bayesian linear model on the features. The table is sorted by it.
    H-score  share of the features' variance that is between the classes, with a shrunk covariance; at most classes - 1.
    LEEP     mean log likelihood of the labels given the source classifier's probabilities; at most 0.
    NCE      minus the conditional entropy of the labels given its predicted classes, in nats; at most 0.

LEEP and NCE are empty where the weights come without a linear classifier. With few images for each source class NCE is
too high. A backbone that fails is reported, and the rest goes on. The table is written to
``lightning_logs/<experiment>/table.csv`` and ``table.md``.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework import ImageFolderDataModule
from framework.errors import ConfigurationError, did_you_mean
from framework.functional import h_score, leep, log_maximum_evidence, negative_conditional_entropy
from framework.networks import create_backbone

SCORES = {"logme": "LogME", "h_score": "H-score", "leep": "LEEP", "nce": "NCE"}
COLUMNS = [
    "backbone",
    "weights",
    *SCORES,
    "images",
    "classes",
    "features",
    "source_classes",
    "image_size",
    "seconds",
    "status",
]
PASSED_ON = ("test_fraction", "val_fraction", "labels_per_class", "crop", "num_workers", "seed")


# ---------------------------------------------------------------------- one backbone
def rank(name: str, weights: str, options: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    """The row of a backbone: one pass over the images, then the scores."""
    start = time.monotonic()
    torch.manual_seed(options.seed)
    network = create_backbone(name, weights).eval().to(options.device)
    expected: Any = network.preprocessing
    data = images(options, image_size=options.image_size or expected.image_size, mean=expected.mean, std=expected.std)
    features, labels = feature_pass(network, data, options.device, progress)
    progress("scores")
    classifier: Any = network.source_classifier
    row: dict[str, Any] = {
        "backbone": name,
        "weights": weights,
        "logme": float(log_maximum_evidence(features, labels)),
        "h_score": float(h_score(features, labels, shrinkage=True)),
        "images": len(labels),
        "classes": len(data.class_names),
        "features": features.shape[1],
        "image_size": data.image_size,
        "status": "finished",
    }
    if classifier is not None:
        bias = classifier.get("bias")
        logits = features @ classifier["weight"].cpu().double().T + (0 if bias is None else bias.cpu().double())
        row |= {
            "leep": float(leep(logits.softmax(dim=1), labels)),
            "nce": float(negative_conditional_entropy(logits.argmax(dim=1), labels)),
            "source_classes": logits.shape[1],
        }
    return row | {"seconds": round(time.monotonic() - start, 1)}


def images(options: argparse.Namespace, **preprocessing: Any) -> ImageFolderDataModule:
    """The data, ready to be read; every file is decoded first where ``preprocessing`` is not known yet."""
    passed_on = {name: getattr(options, name) for name in PASSED_ON}
    data = ImageFolderDataModule(
        options.root,
        batch_size=1,  # of training, which there is none of
        eval_batch_size=options.batch_size,
        check_images=not preprocessing,
        **passed_on,
        **preprocessing,
    )
    data.setup("fit")
    return data


@torch.inference_mode()
def feature_pass(
    network: torch.nn.Module, data: ImageFolderDataModule, device: str, progress: Callable[[str], None]
) -> tuple[Tensor, Tensor]:
    """Features ``[N, D]`` in float64 and labels ``[N]`` of the training images without augmentation, on the CPU."""
    features, labels, start = [], [], time.monotonic()
    for batch in data.unaugmented_train_dataloader():
        output = network(data.normalize(batch.images.to(device)))
        if output.dim() != 2 or not output.isfinite().all():
            raise ConfigurationError(
                "Expected `--backbones` to make finite features [N, D] of the images, but got "
                f"{'others' if output.dim() == 2 else list(output.shape)}."
            )
        features.append(output.float().cpu())
        labels.append(batch.labels)
        done = sum(len(part) for part in labels)
        progress(f"{done:,} of {len(data.train_files):,} images, {done / (time.monotonic() - start):.0f} a second")
    return torch.cat(features).double(), torch.cat(labels)


def show(text: str, end: str = "") -> None:
    """Rewrite the line of the terminal; where the output is none, only lines that end are printed."""
    if sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns - 1
        print(f"\r{text if end else text[:columns]:<{columns}}", end=end, flush=True)
    elif end:
        print(text, end=end, flush=True)


def rank_all(chosen: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all backbones, best first; a failed one says so in ``status`` and comes last."""
    rows = []
    for number, (name, weights) in enumerate(chosen.items(), 1):
        title = f"[{number}/{len(chosen)}] {name}"
        try:
            row = rank(name, weights, options, lambda text, title=title: show(f"{title}: {text}"))  # type: ignore[misc]
            show(f"{title}: LogME {row['logme']:.4f}, {row['seconds']:.0f} s", end="\n")
        except Exception as error:  # whatever it is: the others do not depend on it
            row = {"backbone": name, "weights": weights}
            row["status"] = f"failed: {type(error).__name__}: {own_flags(' '.join(str(error).split()))}"
            show("")
            print(f"{title}: {row['status']}", file=sys.stderr, flush=True)
            if not isinstance(error, ConfigurationError):
                traceback.print_exc()
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("logme", float("-inf")), reverse=True)


def own_flags(message: str) -> str:
    """The framework's names of options, by the names that they have here."""
    for theirs, own in ((r"--data\.root", "--data"), (r"--model\.backbone\b", "--backbones")):
        message = re.sub(theirs, own, message)
    return re.sub(r"--(data|model)\.(?=\w)", "--", message)


# ---------------------------------------------------------------------- tables
def write_csv(rows: list[dict[str, Any]]) -> str:
    """One line a backbone."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_markdown(rows: list[dict[str, Any]]) -> str:
    """The same, to be read."""
    head = ["backbone", "weights", *SCORES.values(), "features", "pixels", "seconds"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        finished = row["status"] == "finished"
        scores = [f"{row[name]:.4f}" if name in row else "" for name in SCORES] if finished else ["failed", "", "", ""]
        rest = [str(row.get(name, "")) for name in ("features", "image_size", "seconds")]
        lines.append(f"| {' | '.join([row['backbone'], row['weights'], *scores, *rest])} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- command line
def number(text: str) -> int | float:
    """``1`` is one, ``1.0`` all."""
    return float(text) if re.search(r"[.eE]", text) else int(text)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--data", "--data.root", dest="root", required=True, metavar="FOLDER", help="FOLDER/<class>/* or with train/")
    add("--backbones", nargs="+", required=True, metavar="NAME", help="as --model.backbone: resnet18, timm/…")
    add(
        "--weights",
        nargs="+",
        default=["DEFAULT"],
        metavar="[NAME=]WEIGHTS",
        help="as --model.weights, of all backbones or of one of them: DEFAULT none resnet18=file.pth",
    )
    add("--labels_per_class", type=number, help="images of each class, or a share of them; default: all")
    add("--val_fraction", type=float, default=0.1, help="held out for validation")
    add("--test_fraction", type=float, default=0.2, help="of one folder held out for test")
    add("--image_size", type=int, help="pixels; default: what each backbone expects")
    add("--crop", default="random_resized", help="of training: evaluation takes the middle of what it crops from")
    add("--batch_size", type=int, default=64, help="images at a time")
    add("--num_workers", type=int, default=2, help="loader processes")
    add("--seed", type=int, default=0, help="of the split and the choice of labels")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, …")
    add("--experiment", default="backbones", help="folder below lightning_logs")
    return parser


def chosen_weights(backbones: list[str], weights: list[str]) -> dict[str, str]:
    """The weights of each backbone: its own, or those of all."""
    if len(set(backbones)) < len(backbones):
        twice = next(name for name in backbones if backbones.count(name) > 1)
        raise ConfigurationError(f"Expected `--backbones` to name each once, but got {twice!r} again.")
    own: dict[str, str] = {}
    of_all: list[str] = []
    for entry in weights:
        name, equals, value = entry.partition("=")
        if not equals:
            of_all.append(entry)
            continue
        if name not in backbones:
            raise ConfigurationError(
                f"Expected `--weights` NAME=WEIGHTS with a name of `--backbones`, but got {name!r}. "
                f"{did_you_mean(name, backbones)}"
            )
        own[name] = value
    if len(of_all) > 1:
        raise ConfigurationError(f"Expected `--weights` once for all backbones, but got {' and '.join(of_all)}.")
    return {name: own.get(name, (of_all or ["DEFAULT"])[0]) for name in backbones}


def main(arguments: list[str] | None = None) -> int:
    """Rank, write the table; 1 where a backbone failed."""
    options = build_parser().parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        chosen = chosen_weights(options.backbones, options.weights)
        data = images(options)
    except ConfigurationError as error:
        print(f"rank_backbones: error: {own_flags(str(error))}", file=sys.stderr)
        return 2
    print(f"{len(data.train_files):,} images of {data.num_classes} classes, {len(chosen)} backbones.", flush=True)
    rows = rank_all(chosen, options)
    folder = Path("lightning_logs") / options.experiment
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.csv").write_text(write_csv(rows), encoding="utf-8")
    (folder / "table.md").write_text(write_markdown(rows), encoding="utf-8")
    print(f"\n{write_markdown(rows)}\n{folder / 'table.md'}, {folder / 'table.csv'}")
    failed = [row for row in rows if row["status"] != "finished"]
    if failed:
        print(f"{len(failed)} of {len(rows)} backbones failed.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
