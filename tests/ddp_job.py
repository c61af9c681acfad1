"""Run by ``test_contract_ddp.py`` in a process of its own: every method with two gloo processes.

Lightning starts the second process by running this file again. Usage: ``ddp_job.py FOLDERS OUTPUT``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from contract import equal, fit, methods, weights

# no batch norm in the backbone: its statistics are each process's own, as under any DDP
DOUBLE = {
    "backbone": "squeezenet1_1",
    "bottleneck_normalization": "none",
    "bottleneck_dropout": 0.0,
    "learning_rate": 0.005,
}


def same_on_both(module: torch.nn.Module) -> bool:
    """Whether the parameters of the two processes are equal."""
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    gathered = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(gathered, flat)
    return torch.equal(*gathered)


def main(root: Path, output: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    two: dict[str, Any] = {"strategy": "ddp_find_unused_parameters_true", "devices": 2, "max_epochs": 2}
    result: dict[str, dict[str, bool]] = {}
    for method in methods():
        checkpoint = output.with_suffix(f".{method.__name__}.ckpt")
        whole = fit(method, root, save=(7, checkpoint), **two)
        agree = same_on_both(whole)
        resumed = fit(method, root, resume=checkpoint, **two)
        result[method.__name__] = {
            "ranks agree": agree,
            "resumed equals whole": equal(weights(whole), weights(resumed)),
        }
        double = fit(method, root, data={"batch_size": 4, "image_size": 32}, model=DOUBLE, precision="64-true", **two)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            torch.save(weights(double), output.with_suffix(f".{method.__name__}.pt"))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        output.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
