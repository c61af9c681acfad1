"""Run by ``pretraining/test_contract_ddp.py`` in a process of its own: every method with two gloo processes.

Lightning starts the second process by running this file again. Usage: ``pretraining_ddp_job.py FOLDERS OUTPUT``.
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
from ddp_job import same_on_both
from pretraining_contract import fit, methods
from transfer_contract import differing, weights


def main(root: Path, output: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    two: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 2}
    result: dict[str, dict[str, bool]] = {}
    for method in methods():
        checkpoint = output.with_suffix(f".{method.__name__}.ckpt")
        whole = fit(method, root, save={7: checkpoint}, **two)
        found = {"ranks agree": same_on_both(whole), "one validation": one_validation(whole)}
        resumed = fit(method, root, resume=checkpoint, **two)
        found["resumed equals whole"] = not differing(weights(whole), weights(resumed))
        result[method.__name__] = found
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        output.write_text(json.dumps(result))


def one_validation(module: Any) -> bool:
    """Whether the processes, each with its share of the images, logged the same loss, which is a number."""
    loss = module.trainer.callback_metrics["val/loss"]
    gathered = [torch.empty_like(loss) for _ in range(2)]
    torch.distributed.all_gather(gathered, loss)
    return bool(torch.isfinite(loss)) and torch.equal(*gathered)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
