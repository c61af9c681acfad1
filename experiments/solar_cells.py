"""Defects of solar cells: how much pretraining, regularisation and fusion are worth with few labels.

    python scripts/prepare_solar_cells.py && python scripts/prepare_lite0_weights.py
    python experiments/solar_cells.py

From ImageNet weights to defects of polycrystalline cells with 10, 30 and 100 % of the labels, by the comparison of
experiments/compare_methods.py; then WiSE-FT between each linear probe and the run that went on from probing to
fine-tuning, by experiments/fuse.py. The table and the figure are written to ``lightning_logs/<experiment>``. What is
finished is not run again.

The images for validation choose WiSE-FT's coefficient; test images choose nothing.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import Any

import compare_methods
import fuse
from comparison_table import SCORES, Row, read_csv, write_csv, write_markdown

from framework.__main__ import main as framework_main
from framework.errors import ConfigurationError

DATA = Path(__file__).resolve().parent / "data" / "solar_cells_poly.yaml"
SCRATCH = "full:weights=none,learning_rate=0.05,backbone_learning_rate_factor=1.0"
# DELTA's channel weights to first order: the paper's cost thousands of passes
METHODS = [SCRATCH, "full", "frozen", "lp_ft", "l2_sp", "delta:attention=first_order,trade_off=0.01"]
WISE_FT = "wise_ft"
SCORE = "mean_class_accuracy"


def interpolate(start: Row, end: Row, folder: Path, options: list[str]) -> Row:
    """WiSE-FT between the runs of two rows, tested: a row of its own."""
    name = f"{folder.name}/{WISE_FT}/{end['pair'].replace(' ', '_').replace(',', '')}/seed_{end['seed']}"
    run = Path("lightning_logs") / name / "version_0"
    if not (run / "metrics.csv").exists():
        checkpoints = [str(folder / row["run"] / "checkpoints" / "last.ckpt") for row in (start, end)]
        words = ["wise_ft", "--start", checkpoints[0], "--end", checkpoints[1], "--experiment", name]
        if fuse.main([*words, *options]) or framework_main(
            ["test", "--run", str(run), "--trainer.enable_progress_bar", "false"]
        ):
            raise ConfigurationError(f"Expected WiSE-FT of '{checkpoints[0]}' and '{checkpoints[1]}' to succeed.")
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        found = {row["name"]: float(row["value"]) for row in csv.DictReader(file)}
    scores = {score: found[f"test/{score}"] for score in SCORES}
    return end | scores | {"method": WISE_FT, "run": str(run.relative_to(folder)), "seconds_per_step": "", "cell": ""}


def draw(rows: list[Row], path: Path) -> None:
    """Balanced accuracy by the share of labels, a line a method with the standard deviation over the seeds."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigurationError(
            "Expected Matplotlib for the figure, but it is not installed: pip install 'transfer-framework[comparison]'."
        ) from error
    figure, axes = plt.subplots(figsize=(7, 4.5))
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    for method in dict.fromkeys(row["method"] for row in rows):
        values = [[100 * row[SCORE] for row in rows if (row["pair"], row["method"]) == (p, method)] for p in pairs]
        means = [statistics.mean(value) for value in values]
        spread = [statistics.stdev(value) if len(value) > 1 else 0.0 for value in values]
        label = "from scratch" if method == SCRATCH else method.split(":")[0]
        axes.errorbar(range(len(pairs)), means, yerr=spread, marker="o", capsize=3, label=label)
    axes.set_xticks(range(len(pairs)), [f"{100 * float(pair.rsplit(' ', 1)[1]):.0f} %" for pair in pairs])
    axes.set_xlabel("labels")
    axes.set_ylabel("balanced accuracy, %")
    axes.set_title("Defects of polycrystalline cells, test images")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write table and figure."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=DATA, metavar="YAML", help="as experiments/data/solar_cells_poly")
    parser.add_argument("--labels_per_class", nargs="+", default=["0.1", "0.3", "1.0"], metavar="SHARE")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, 0 to SEEDS - 1")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME", help="as of compare_methods.py")
    parser.add_argument("--experiment", default="solar_transfer", help="folder below lightning_logs")
    options = parser.parse_args(arguments)
    words = ["--data", str(options.data), "--methods", *options.methods, "--baseline", "full", "--score", SCORE]
    words += ["--experiment", options.experiment, "--seeds", str(options.seeds)]
    if code := compare_methods.main([*words, "--labels_per_class", *options.labels_per_class]):
        return code
    folder = Path("lightning_logs") / options.experiment
    try:
        rows = read_csv(folder / "table.csv")
        of: dict[Any, Row] = {(row["pair"], row["seed"], row["method"]): row for row in rows}
        for pair, seed, method in list(of):
            if method == "lp_ft" and (pair, seed, "frozen") in of:
                rows.append(interpolate(of[pair, seed, "frozen"], of[pair, seed, method], folder, []))
        methods = [*options.methods, WISE_FT]
        for row in rows:
            row["seconds_per_step"] = ""  # other things may have run beside
        pairs = list(dict.fromkeys(row["pair"] for row in rows))
        baselines = [name for name in (SCRATCH, "full") if name in options.methods]
        text = write_markdown(rows, methods, pairs, baselines, SCORE)
        draw(rows, folder / "labels.png")
    except ConfigurationError as error:
        print(f"solar_cells: error: {error}", file=sys.stderr)
        return 2
    (folder / "with_fusion.csv").write_text(write_csv(rows), encoding="utf-8")
    (folder / "with_fusion.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{folder / 'with_fusion.md'}, {folder / 'with_fusion.csv'}, {folder / 'labels.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
