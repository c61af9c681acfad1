"""Time and memory of the losses on features, forward and backward, relative to a named floor in the same run.

- MK-MMD: five kernels. The floor is one Gram matrix of the joint sample, centred, one exponential, repeated squaring,
  and autograd.
- JMMD: the five kernels times one on 31 probabilities. The same floor, with a Gram matrix of each layer.
- CORAL: the floor is the difference of the two covariance matrices, and autograd.

The forms take turns, repeat by repeat, so that all see the same machine; ratios are those of the medians. Each form's
peak memory, above that of the features, is measured in a process of its own (on a GPU: as its allocator counts).
Peers are columns where they import: pytorch-adapt, geomloss, POT (package ot). What a form computes differently is said
below the table. A form that may not fit into memory is left out.

    python scripts/benchmark_losses.py [--losses mk_mmd jmmd coral] [--sizes 256 2048] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import high_water, in_own_process, in_words, machine, milliseconds, synchronize, table
from torch import Tensor

from framework.functional import FIVE_SCALES, coral, joint_mmd, unbiased_mmd

CLASSES = 31
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Form = Callable[..., Tensor]  # of the leaves that `inputs` makes


class Loss(NamedTuple):
    """What is compared: by the name of the form, the floor first."""

    forms: dict[str, Form]
    sizes: tuple[int, ...]
    widths: tuple[int, ...]


# ---------------------------------------------------------------- the floors
def gram_kernels(source: Tensor, target: Tensor, scales: tuple[float, ...], bandwidth: float | None) -> Tensor:
    """The sum of kernels of the joint sample ``[N + M, N + M]``; the scales are powers of two, ascending."""
    joint = torch.cat([source, target])
    joint = joint - joint.detach().mean(0)
    norms = joint.square().sum(1)
    squared = (norms[:, None] + norms[None, :] - 2.0 * joint @ joint.T).clamp(min=0.0)
    width = squared.detach().mean() if bandwidth is None else bandwidth
    kernel = total = torch.exp(squared / (-2.0 * scales[-1] * width))
    for _ in scales[1:]:
        kernel = kernel * kernel
        total = total + kernel
    return total


def unbiased(kernel: Tensor, n: int) -> Tensor:
    """The U-statistic of a kernel of the joint sample, with ``n`` samples of each domain."""
    within = sum(block.sum() - block.trace() for block in (kernel[:n, :n], kernel[n:, n:])) / (n * (n - 1))
    return within - 2.0 * kernel[:n, n:].mean()


def gram_mk_mmd(source: Tensor, target: Tensor) -> Tensor:
    """One Gram matrix, one exponential, repeated squaring, autograd."""
    return unbiased(gram_kernels(source, target, FIVE_SCALES, None), len(source))


def gram_jmmd(*leaves: Tensor) -> Tensor:
    """The same, with a Gram matrix of each layer."""
    source, target, of_source, of_target = leaves
    kernel = gram_kernels(source, target, FIVE_SCALES, None) * gram_kernels(of_source, of_target, (1.0,), 0.92**2)
    return unbiased(kernel, len(source))


def covariances(source: Tensor, target: Tensor) -> Tensor:
    """The difference of the two covariance matrices."""
    x, y = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (source, target))
    return (x.T @ x - y.T @ y).square().sum() / (4 * x.shape[1] ** 2)


def sample_products(source: Tensor, target: Tensor) -> Tensor:
    """The same number by the Gram matrices of the samples."""
    x, y = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (source, target))
    squared = (x @ x.T).square().sum() + (y @ y.T).square().sum() - 2.0 * (x @ y.T).square().sum()
    return squared / (4 * x.shape[1] ** 2)


# ---------------------------------------------------------------- this project and the peers
def our_jmmd(*leaves: Tensor) -> Tensor:
    """This project's, of the layers in the order of the leaves."""
    return joint_mmd(leaves[::2], leaves[1::2])


LOSSES = {
    "mk_mmd": Loss({"Gram, autograd": gram_mk_mmd, "this project": unbiased_mmd}, (256, 2048, 8192), (256,)),
    "jmmd": Loss({"Gram, autograd": gram_jmmd, "this project": our_jmmd}, (32, 256), (256,)),
    "coral": Loss(
        {"covariances, autograd": covariances, "sample products, autograd": sample_products, "this project": coral},
        (32, 256),
        (256, 2048),
    ),
}
NOTES = {
    "pytorch-adapt": "pytorch-adapt: the quadratic MMDLoss with five kernels, on a bandwidth of its own choice.",
    "geomloss": "geomloss: SamplesLoss('gaussian'), the biased MMD of one kernel.",
    "POT": "POT: exact optimal transport of the batch (`ot.emd2`), for scale: another distance than the loss's.",
}


def peers(loss: str) -> dict[str, Form]:
    """The forms of the packages that import."""
    found: dict[str, Form] = {}
    if loss != "mk_mmd":
        return found
    try:
        layers = importlib.import_module("pytorch_adapt.layers")
        scales = torch.tensor([1.0 / (2.0 * scale) for scale in FIVE_SCALES], device=DEVICE)
        found["pytorch-adapt"] = layers.MMDLoss(kernel_scales=scales, mmd_type="quadratic")
    except Exception as error:  # a peer that no longer imports or has another signature is no column
        print(f"no column for pytorch-adapt: {error!r}", file=sys.stderr)
    try:
        found["geomloss"] = importlib.import_module("geomloss").SamplesLoss("gaussian", blur=16.0, backend="tensorized")
    except Exception as error:
        print(f"no column for geomloss: {error!r}", file=sys.stderr)
    try:
        ot = importlib.import_module("ot")

        def transport(source: Tensor, target: Tensor) -> Tensor:
            weights = torch.full((len(source),), 1.0 / len(source), device=source.device)
            value: Tensor = ot.emd2(weights, weights, ot.dist(source, target))
            return value

        found["POT"] = transport
    except Exception as error:
        print(f"no column for POT: {error!r}", file=sys.stderr)
    return found


# ---------------------------------------------------------------- measuring
def inputs(loss: str, n: int, width: int) -> list[Tensor]:
    """Leaves: features of both domains and, for JMMD, probabilities of both."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, width, generator=generator) + shift for shift in (0.0, 0.3)]
    if loss == "jmmd":
        leaves += [torch.randn(n, CLASSES, generator=generator).mul(2).softmax(1) for _ in range(2)]
    return [x.to(DEVICE).requires_grad_() for x in leaves]


def run(form: Form, leaves: list[Tensor]) -> tuple[float, float]:
    """Seconds of forward and backward, and the value."""
    for leaf in leaves:
        leaf.grad = None
    synchronize()
    start = time.perf_counter()
    value = form(*leaves)
    value.backward()
    synchronize()
    return time.perf_counter() - start, value.item()


def time_all(forms: dict[str, Form], leaves: list[Tensor], repeats: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Median, quartiles and value of each form; the forms take turns.

    At least three turns, then until ``repeats`` of them or the seconds are over.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    values = {name: run(form, leaves)[1] for name, form in forms.items()}  # warms up
    end = time.perf_counter() + seconds
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, form in forms.items():
            times[name].append(run(form, leaves)[0])
    return {name: {**milliseconds(of_form), "value": values[name]} for name, of_form in times.items()}


def peak_memory(loss: str, form: str, n: int, width: int) -> float | None:
    """MiB above the features, in a process of its own; None where that failed, as without memory."""
    arguments = ["--memory_of", loss, form, str(n), str(width)]
    printed = in_own_process(__file__, arguments, {"MALLOC_MMAP_THRESHOLD_": "65536"})  # freed memory goes back
    return None if printed is None else float(printed)


def print_memory(loss: str, form: str, n: int, width: int) -> None:
    """What ``peak_memory`` reads."""
    function = (LOSSES[loss].forms | peers(loss))[form]
    run(function, inputs(loss, 8, width))  # libraries and threads are there
    leaves = inputs(loss, n, width)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(function, leaves)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    before = high_water(reset=True)
    run(function, leaves)
    print(high_water() - before)


def fits(n: int) -> bool:
    """Whether the dozen matrices of all pairs of the joint sample that autograd keeps would fit into free memory."""
    needed = 12 * (2 * n) ** 2 * 4
    if DEVICE.type == "cuda":
        return needed < torch.cuda.mem_get_info()[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if Path("/proc/meminfo").exists():  # what files in memory take can be had, too
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    return needed < free or n <= 256


# ---------------------------------------------------------------- output
def markdown(result: dict[str, Any]) -> str:
    """The tables: a row for each form and size."""
    rows = []
    for row in result["rows"]:
        low, high = row["quartiles_ms"]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
        times = [f"{row['ms']:.2f}", f"{low:.2f}-{high:.2f}"]
        rows.append([row["loss"], row["n"], row["d"], row["form"], *times, ratio, peak])
    floors = "; ".join(
        f"{loss}: {next(iter(LOSSES[loss].forms))}" for loss in sorted({r["loss"] for r in result["rows"]})
    )
    columns = ["loss", "n", "d", "form", "ms", "quartiles", "ratio", "peak, MiB"]
    lines = [in_words(result["machine"]), "", table(columns, rows)]
    lines += [f"Ratios to the floor of the same loss and size ({floors}); n samples of each domain."]
    lines += [NOTES[form] for form in NOTES if any(row["form"] == form for row in result["rows"])]
    lines += [f"Left out for want of memory: {text}." for text in result["left_out"]]
    return "\n".join(lines) + "\n"


def measure(name: str, n: int, width: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each form, the floor first; and what was left out."""
    every = LOSSES[name].forms | ({} if options.no_peers else peers(name))
    # but ours, all make matrices of pairs; POT's solver takes minutes beyond this size
    forms = {key: form for key, form in every.items() if key == "this project" or name == "coral" or fits(n)}
    if n > 2048:
        forms.pop("POT", None)
    timed = time_all(forms, inputs(name, n, width), options.repeats, options.seconds)
    floor = timed.get(next(iter(LOSSES[name].forms)))
    rows = []
    for form, figures in timed.items():
        ratio = figures["ms"] / floor["ms"] if floor else None
        peak = None if options.no_memory else peak_memory(name, form, n, width)
        rows.append({"loss": name, "n": n, "d": width, "form": form, **figures, "ratio": ratio, "peak_mib": peak})
    return rows, [f"{name}, n = {n}: {form}" for form in every if form not in forms]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=sorted(LOSSES), default=sorted(LOSSES, reverse=True))
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="samples of each domain; default: by loss")
    parser.add_argument("--width", type=int, help="of the features; default: by loss, 256 among them")
    parser.add_argument("--repeats", type=int, default=21, help="turns at most")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of a loss and size; three turns there are at least"
    )
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--no_memory", action="store_true", help="do not start a process for each form")
    parser.add_argument("--no_peers", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="default: printed only")
    parser.add_argument("--memory_of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        loss, form, n, width = options.memory_of
        print_memory(loss, form, int(n), int(width))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes that measure memory
    result: dict[str, Any] = {
        "machine": machine("torch", "pytorch-adapt", "geomloss", "POT"),
        "rows": [],
        "left_out": [],
    }
    for name in options.losses:
        for n in options.sizes or LOSSES[name].sizes:
            for width in [options.width] if options.width else LOSSES[name].widths:
                rows, left_out = measure(name, n, width, options)
                result["rows"] += rows
                result["left_out"] += left_out
                print(f"{name}, n = {n}, d = {width}: done", file=sys.stderr, flush=True)
    text = markdown(result)
    print(text)
    for path, content in ((options.json, json.dumps(result, indent=2) + "\n"), (options.markdown, text)):
        if path is not None:
            path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
