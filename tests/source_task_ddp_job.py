"""Run by ``test_source_task_ddp.py`` in a process of its own: LWF, Co-Tuning and Bi-Tuning with two gloo processes.

Lightning starts the second process by running this file again. Usage: ``source_task_ddp_job.py FOLDER OUTPUT``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contract import weights
from source_task import CLASSES, SOURCE_CLASSES, differing, fit

from framework import LWF, BiTuning, CoTuning


def build(method: type[Any], **options: Any) -> Callable[[], Any]:
    """A network without batch norm, whose statistics are each process's own; its source head is any."""

    def built() -> Any:
        defaults: dict[str, Any] = {"backbone": "squeezenet1_1", "learning_rate": 0.005}
        if method is BiTuning:
            return BiTuning(CLASSES, queue_length=4, momentum=0.9, **{**defaults, **options})
        if method is CoTuning:
            defaults["relationship"] = "direct"  # in which each image's share is seen
        model = method(CLASSES, source_classes=SOURCE_CLASSES, **{**defaults, **options})
        model.source_head_loaded.fill_(True)
        return model

    return built


METHODS = [LWF, CoTuning, BiTuning]


def data(method: type[Any], **options: Any) -> dict[str, Any]:
    return {"image_size": 32, "views": 2 if method is BiTuning else 1, **options}


def same_on_both(module: torch.nn.Module) -> bool:
    """Whether parameters and buffers of the two processes are equal; statistics are each one's own."""
    state = [value.detach().double().flatten() for name, value in weights(module).items() if not name.startswith("val")]
    flat = torch.cat(state)
    gathered = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(gathered, flat)
    return torch.equal(*gathered)


def main(root: Path, output: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    two: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 2}
    result: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        name, checkpoint = method.__name__, output.with_suffix(f".{method.__name__}.ckpt")
        whole = fit(build(method), root, save=(7, checkpoint), data=data(method), **two)
        agree = same_on_both(whole)
        resumed = fit(build(method), root, resume=checkpoint, data=data(method), **two)
        result[name] = {"ranks agree": agree, "resumed differs in": differing(whole, resumed)}
        double = fit(build(method), root, data=data(method), precision="64-true", **two)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            torch.save(weights(double), output.with_suffix(f".{name}.pt"))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        output.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
