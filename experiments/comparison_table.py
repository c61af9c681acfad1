"""The table of a comparison, from its rows: means over the seeds, standard deviations, gains paired by seed.

    python experiments/comparison_table.py experiments/comparison.csv --baselines source_only no_alignment

A comparison (experiments/compare_methods.py) prints and writes such a table at its end; this makes others of the same
rows: against other methods, of another score, or of several comparisons together.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.errors import ConfigurationError, did_you_mean

SCORES = ["accuracy", "mean_class_accuracy", "macro_f1", "calibration_error"]
COLUMNS = ["pair", "method", "seed", *SCORES, "seconds_per_step", "steps", "warnings", "status", "run", "cell"]
SHOWN = {"accuracy": "accuracy, %", "mean_class_accuracy": "class mean, %", "macro_f1": "macro-F1, %"}
Row = dict[str, Any]


def write_csv(rows: list[Row]) -> str:
    """One line a cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[Row]:
    """What :func:`write_csv` has written."""
    try:
        rows: list[Row] = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        raise ConfigurationError(f"Expected '{path}' to be the table of a comparison: {error.strerror}.") from error
    if not rows or not {"pair", "method", "seed", "status"} <= rows[0].keys():
        raise ConfigurationError(f"Expected '{path}' to be the table of a comparison, table.csv, but it is another.")
    for row in rows:
        row["seed"] = int(row["seed"])
        row |= {name: float(row[name]) for name in (*SCORES, "seconds_per_step") if row[name] != ""}
    return rows


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


def _gain(values: dict[int, float], baseline: dict[int, float]) -> str:
    paired = paired_gain(values, baseline)
    if paired is None:
        return ""
    interval = f" ± {100 * paired[1]:.1f}" if paired[1] == paired[1] else ""
    return f"{100 * paired[0]:+.1f}{interval}"


def write_markdown(
    rows: list[Row], methods: Sequence[str], pairs: Sequence[str], to: Sequence[str], score: str = "accuracy"
) -> str:
    """One line a method and pair, best first by ``score``: means over the seeds with standard deviations (n - 1), the
    gain in ``score`` over each method of ``to`` and, where it was measured, the time of a step relative to its first.
    """
    finished = [row for row in rows if row["status"] == "finished"]
    timed = any(row.get("seconds_per_step") not in (None, "") for row in finished)
    head = ["data", "method", *SHOWN.values(), *(f"gain over {name} ± 95 %" for name in to)]
    head += [*(["step time"] if timed else []), "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for pair in pairs:
        of: dict[str, dict[int, Row]] = {method: {} for method in methods}
        for row in finished:
            if row["pair"] == pair and row["method"] in of:
                of[row["method"]][row["seed"]] = row
        values = {method: {seed: row[score] for seed, row in cells.items()} for method, cells in of.items()}
        failed = {row["method"] for row in rows if row["pair"] == pair and row["status"] != "finished"}
        means = {method: statistics.mean(of_seeds.values()) for method, of_seeds in values.items() if of_seeds}
        for method in sorted(means, key=means.__getitem__, reverse=True):
            cells = of[method]
            fields = [pair.split("_to_", 1)[-1], method]
            fields += [_mean_and_deviation([row[name] for row in cells.values()]) for name in SHOWN]
            fields += ["" if name == method else _gain(values[method], values.get(name, {})) for name in to]
            if timed:
                fields.append(_time_ratio(cells, of.get(to[0], {})))
            fields.append(f"{len(cells)}" + (", others failed" if method in failed else ""))
            lines.append(f"| {' | '.join(fields)} |")
        without = [method for method in methods if method in failed and not of[method]]
        lines += [
            f"| {pair.split('_to_', 1)[-1]} | {method} | failed |{' |' * (len(head) - 4)} 0 |" for method in without
        ]
    return "\n".join(lines) + "\n"


def _time_ratio(cells: dict[int, Row], baseline: dict[int, Row]) -> str:
    ratios = [
        cells[seed]["seconds_per_step"] / baseline[seed]["seconds_per_step"]
        for seed in sorted(cells.keys() & baseline.keys())
        if cells[seed]["seconds_per_step"] != "" and baseline[seed]["seconds_per_step"] != ""
    ]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("tables", nargs="+", type=Path, metavar="CSV", help="table.csv of a comparison, or several")
    parser.add_argument("--baselines", nargs="+", required=True, metavar="NAME", help="methods to compare with")
    parser.add_argument(
        "--score", choices=list(SHOWN), default="accuracy", help="what gains are in (default: accuracy)"
    )
    options = parser.parse_args(arguments)
    try:
        rows = [row for path in options.tables for row in read_csv(path)]
        methods = list(dict.fromkeys(row["method"] for row in rows))
        for name in options.baselines:
            if name not in methods:
                raise ConfigurationError(
                    f"Expected `--baselines` to be methods of the table, but got {name!r}. "
                    f"{did_you_mean(name, methods)}"
                )
        pairs = list(dict.fromkeys(row["pair"] for row in rows))
        print(write_markdown(rows, methods, pairs, options.baselines, options.score), end="")
    except ConfigurationError as error:
        print(f"comparison_table: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
