"""Run by ``test_cache_ddp.py`` in a process of its own: the batches of two gloo processes, without and with caches.

Lightning starts the second process by running this file again. Usage: ``cache_ddp_job.py FOLDER CACHE OUTPUT``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

import framework.datamodules.cache as cache
from framework import DomainPairDataModule


class Recorder(L.LightningModule):
    """Keeps the training images, and looks at the caches while they are in use."""

    def __init__(self, folders: list[Path]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folders, self.files = folders, set[str]()
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.append(torch.cat([batch.source.images, batch.target]))
        self.files |= {str(file) for folder in self.folders for file in folder.glob("*.pixels")}
        return self.weight * batch.target.mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append(batch if isinstance(batch, Tensor) else batch.images)


def main(root: Path, folder: Path, output: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    places = {"memory": folder / "memory", "disk": folder / "disk"}
    cache._memory_folder = lambda: places["memory"]  # type: ignore[assignment]
    decoded: list[str] = []
    read = cache.read_pixels
    cache.read_pixels = lambda path: decoded.append(path) or read(path)  # type: ignore[func-returns-value]
    runs: dict[str, list[Tensor]] = {}
    found: dict[str, Any] = {}
    for storage in ("none", "memory", "disk"):
        decoded.clear()
        recorder = Recorder(list(places.values()))
        data = DomainPairDataModule(
            str(root / "source"),
            str(root / "target"),
            batch_size=4,
            image_size=20,
            num_workers=1,
            seed=3,
            cache=storage,  # type: ignore[arg-type]
            cache_dir=str(places["disk"]),
        )
        L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            strategy="ddp",
            devices=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(recorder, data)
        runs[storage] = recorder.trained + recorder.validated
        gathered: list[Any] = [None, None]
        torch.distributed.all_gather_object(gathered, (sorted(decoded), sorted(recorder.files)))
        found[storage] = {"decoded": [len(d) for d, _ in gathered], "files": [f for _, f in gathered]}
        own = [torch.zeros_like(recorder.trained[0]) for _ in range(2)]
        torch.distributed.all_gather(own, recorder.trained[0])
        found[storage]["ranks differ"] = not torch.equal(*own)
    same = [
        [len(runs[s]) == len(runs["none"]) and all(map(torch.equal, runs[s], runs["none"])) for s in ("memory", "disk")]
    ] * 2
    torch.distributed.all_gather_object(same, same[0])
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        output.write_text(json.dumps({"same batches": same, "batches": len(runs["none"]), **found}))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
