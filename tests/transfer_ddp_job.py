"""Run by ``transfer/test_contract_ddp.py`` in a process of its own: every transfer method with two gloo processes.

Lightning starts the second process by running this file again. Usage: ``transfer_ddp_job.py FOLDER OUTPUT``.
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
from transfer_contract import Case, cases, differing, fit, weights

from framework.modules import TransferClassifier

# no batch norm in the backbone: its statistics are each process's own, as under any DDP
DOUBLE: dict[str, Any] = {
    "model": {
        "backbone": "squeezenet1_1",
        "weights": None,
        "bottleneck_normalization": "none",
        "bottleneck_dropout": 0.0,
        "learning_rate": 0.005,
    },
    "precision": "64-true",
    "max_epochs": 2,
}
GRADUAL = Case("gradual", TransferClassifier, {"policy": "gradual", "unfreeze_at": [0.2, 0.4, 0.6]})
STRATEGIES = ("ddp", "ddp_find_unused_parameters_true")


def main(root: Path, output: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    result: dict[str, dict[str, bool]] = {}
    for case in cases():
        found = {}
        for strategy in STRATEGIES if case.options.get("policy") in ("gradual", "lp_ft") else STRATEGIES[:1]:
            two: dict[str, Any] = {"strategy": strategy, "devices": 2, "max_epochs": 2}
            checkpoint = output.with_suffix(f".{case.name}.ckpt")
            whole = fit(case, root, save={4: checkpoint}, **two)  # where a stage is unfrozen, in mid-epoch
            resumed = fit(case, root, resume=checkpoint, **two)
            found[f"{strategy}: ranks agree"] = same_on_both(whole)
            found[f"{strategy}: resumed equals whole"] = not differing(weights(whole), weights(resumed))
        result[case.name] = found
    for strategy in STRATEGIES:
        double = fit(GRADUAL, root, data={"batch_size": 4, "image_size": 32}, strategy=strategy, devices=2, **DOUBLE)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            torch.save(weights(double), output.with_suffix(f".{strategy}.pt"))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        output.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
