"""The hyperparameters with the final metrics, for TensorBoard's HPARAMS tab."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams as hparams_summary
from torch.utils.tensorboard.summary import scalar
from torch.utils.tensorboard.writer import FileWriter

from framework.seeding import global_seed


class FinalMetrics(L.Callback):
    """Writes the hyperparameters at the start of a run, the last ``val/…`` values at its end, ``test/…`` after a test.

    They go to a TensorBoard run of their own, the folder ``final`` in the run's folder: the HPARAMS tab shows all
    scalars of a run that has hyperparameters, and there these are ``final/val/…`` and ``final/test/…`` only. What
    ``SummaryWriter`` writes to name the metrics is left out, because TensorBoard takes it from one run only, and
    would hide the hyperparameters and metrics that another method has beyond that.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the hyperparameters: a run that is stopped is listed too."""
        self._write(trainer, pl_module, {})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last validation."""
        self._write(trainer, pl_module, _final(trainer, "val/"))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the test."""
        self._write(trainer, pl_module, _final(trainer, "test/"))

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, metrics: Mapping[str, float]) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                write_hyperparameters(Path(logger.log_dir) / "final", hyperparameters(trainer, pl_module), metrics)


def _final(trainer: L.Trainer, prefix: str) -> dict[str, float]:
    return {
        f"final/{name}": float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)
    }


IDLE = (
    "check_images",
    "eval_batch_size",
    "num_workers",
    "workers",
    "seed",
)  # options of the data that change no result


def hyperparameters(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """What a run is made of: class and options of the model, options of the data as ``data/…``, length and seed.

    The tab sorts them by name and shows the first few that differ; ``Model`` is spelled so that it comes first.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    data = {} if datamodule is None else dict(datamodule.hparams)
    values = {
        **pl_module.hparams,
        "data": {name: value for name, value in data.items() if name not in IDLE},
        "Model": type(pl_module).__name__,
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "seed": getattr(datamodule, "seed", global_seed()),
    }
    return _flat(values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as ``outer/inner``, numbers as they are, the rest as text; without what is None or private."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or name.startswith("_"):
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{name}"] = ", ".join(str(item) for item in value)
        elif isinstance(value, int | float) and not isinstance(value, bool):  # torch writes a bool as a number
            flat[f"{prefix}{name}"] = value
        else:
            flat[f"{prefix}{name}"] = str(value).lower() if isinstance(value, bool) else str(value)
    return flat


def write_hyperparameters(folder: Path, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """One session of the HPARAMS tab, with the last value of each metric.

    Args:
        folder: of the session; another call for the same folder adds to it.
        parameters: numbers, booleans and text.
        metrics: values by name.
    """
    writer = FileWriter(str(folder))
    _, start, end = hparams_summary(dict(parameters), {})  # type: ignore[no-untyped-call]
    writer.add_summary(start)
    for name, value in metrics.items():
        writer.add_summary(scalar(name, value), 0)  # type: ignore[no-untyped-call]
    if metrics:
        writer.add_summary(end)
    writer.close()
