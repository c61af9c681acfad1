"""Run by ``test_shapes_only.py`` in a process of its own: steps of every method where only shapes are.

Usage: ``shapes_only_job.py DOMAINS TRANSFER PRETRAINING OUTPUT [CASE ...]``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contract
import lightning.pytorch as L
import pretraining_contract
import transfer_contract
from shapes_only import OnShapesOnly, SomeSteps

from framework.callbacks import PretextImages, SampleImages
from framework.datamodules import ImageFolderDataModule
from framework.modules import ResidualClassifier
from framework.trainer import Trainer

AUGMENTATION: dict[str, Any] = {
    "augment_on": "device",
    "crop": "random_resized",
    "color_jitter": 0.5,
    "grayscale": 0.2,
    "blur": 0.5,
}
# these look at the first batch's images once
LOOK = (SampleImages, PretextImages)
Build = Callable[[], tuple[L.LightningModule, L.LightningDataModule]]
BATCHES, EVERY = 8, 3


def cases(domains: Path, transfer: Path, pretraining: Path) -> Iterator[tuple[str, Build, dict[str, Any]]]:
    """Every method of every kind, then options that change what a step does on its device."""
    for method in contract.methods():
        for policy in ("", "separate", "domain_specific"):
            if policy not in method.refused_batch_norm:
                options = {"batch_norm": policy} if policy else {}

                def adaptation(method: Any = method, options: Any = options) -> Any:
                    return contract.build_model(method, **options), contract.build_data(domains)

                yield f"{method.__name__} {policy}".rstrip(), adaptation, {}
    for case in transfer_contract.cases():

        def tuned(case: Any = case) -> Any:
            return transfer_contract.build_model(case, transfer), transfer_contract.build_data(transfer)

        yield f"transfer {case.name}", tuned, {}
    for task in pretraining_contract.methods():

        def pretrained(task: Any = task) -> Any:
            return pretraining_contract.build_model(task), pretraining_contract.build_data(pretraining, task)

        yield f"pre-training {task.__name__}", pretrained, {}

    def dann(**options: Any) -> Any:
        (method,) = (found for found in contract.methods() if found.__name__ == "DANN")
        return contract.build_model(method, **options), contract.build_data(domains)

    def augmented() -> Any:
        module, _ = dann()
        return module, contract.build_data(domains, **AUGMENTATION)

    def residual() -> Any:
        data = transfer_contract.build_data(transfer)
        assert isinstance(data, ImageFolderDataModule)
        return ResidualClassifier(3), data

    yield "ResidualClassifier", residual, {}
    yield "augment_on device", augmented, {}
    yield "AdamW", lambda: dann(optimizer="AdamW"), {}
    yield "clipped", dann, {"gradient_clip_val": 1.0}
    yield "accumulated", dann, {"accumulate_grad_batches": 2}


def run(build: Build, options: dict[str, Any]) -> str:
    """What is wrong with a run of a few steps, or nothing."""
    L.seed_everything(0, verbose=False)
    strategy = OnShapesOnly()
    try:
        module, data = build()
        trainer = Trainer(
            **{**transfer_contract.QUIET, **options, "accelerator": "auto"},
            strategy=strategy,
            max_epochs=3,
            limit_val_batches=0,
            log_every_n_steps=EVERY,
            callbacks=[SomeSteps(BATCHES)],
        )
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, LOOK)]
        trainer.fit(module, data)
    except SomeSteps.Done:
        rows = BATCHES // options.get("accumulate_grad_batches", 1) // EVERY
        return "" if len(strategy.reads) == rows else f"values read {len(strategy.reads)} times, for {rows} rows"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [
            f"{Path(frame.filename).name}:{frame.lineno}"
            for frame in frames
            if f"{os.sep}framework{os.sep}" in frame.filename
        ]
        return f"{type(error).__name__}: {str(error)[:300]} ({', '.join(ours) or 'outside of the framework'})"
    return "the run ended by itself"


def main(domains: Path, transfer: Path, pretraining: Path, output: Path, names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.LightningModule.log = lambda *_, **__: None  # type: ignore[method-assign]  # torchmetrics' copies need values
    found = cases(domains, transfer, pretraining)
    result = {name: run(build, options) for name, build, options in found if not names or name in names}
    output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]), sys.argv[5:])  # type: ignore[arg-type, misc]
    os._exit(0)  # autograd's threads of the accelerator do not end by themselves
