"""The Trainer with the project's defaults."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler

from framework.allocator import KeepMemory
from framework.callbacks import (
    ConfusionMatrix,
    FinalMetrics,
    PredictionWriter,
    PretextImages,
    SampleImages,
    UnhurriedProgressBar,
)
from framework.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from framework.errors import ConfigurationError
from framework.loggers import AppendingCSVLogger, TensorBoardRun

MATMUL_PRECISIONS = ("highest", "high", "medium")


class Trainer(L.Trainer):
    """Lightning's Trainer, with runs in ``lightning_logs/<experiment>/version_N``.

    It adds, unless told otherwise: TensorBoard and ``metrics.csv`` in the run's folder, the checkpoints ``last.ckpt``
    and ``best.ckpt`` written atomically, sample images, pictures of a self-supervised task, the hyperparameters with
    the final metrics, the confusion matrix of a test and the table of a prediction.

    Args:
        experiment: name of the experiment, a folder below ``lightning_logs``; may hold slashes.
        run: folder of an existing run, to continue or evaluate it there.
        logger: a logger, loggers, or False for none; default: the two above.
        callbacks: callbacks to add; a ``ModelCheckpoint`` among them does not replace ``last`` and ``best``.
        enable_checkpointing: False for no checkpoints.
        keep_memory: on a CPU, a ``fit`` keeps memory once taken instead of giving it back to the system after every
            step, which costs a twentieth of the step and more (:func:`~framework.allocator.keep_freed_memory`). The
            process then stays as large as its largest step to its end.
        float32_matmul_precision: of matrix products of float32 tensors: ``highest``, ``high`` (TF32 on a GPU) or
            ``medium`` (there the same, bfloat16 where the device has it), as ``torch.set_float32_matmul_precision`` has
            it, for the rest of the process; None leaves it alone. Losses on features stay exact
            (:mod:`framework.functional.precision`).
        limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches: batches an epoch as a whole
            number, or a share of them as a fraction (``1`` is one batch, ``1.0`` all).
        options: those of ``lightning.pytorch.Trainer``.
    """

    def __init__(
        self,
        *,
        experiment: str = "default",
        run: str | None = None,
        logger: Logger | list[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        plugins: Any = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = False,
        num_sanity_val_steps: int | None = 0,
        keep_memory: bool = True,
        float32_matmul_precision: str | None = None,
        # here for the command line: in Lightning's signature the float comes first, and 1 would become 1.0, all batches
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **options: Any,
    ) -> None:
        if float32_matmul_precision is not None:
            if float32_matmul_precision not in MATMUL_PRECISIONS:
                raise ConfigurationError(
                    f"Expected `--trainer.float32_matmul_precision` to be {', '.join(MATMUL_PRECISIONS[:-1])} or "
                    f"{MATMUL_PRECISIONS[-1]}, but got {float32_matmul_precision!r}."
                )
            torch.set_float32_matmul_precision(float32_matmul_precision)
        given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        dry = bool(options.get("fast_dev_run")) or bool(options.get("barebones"))
        if logger is None or logger is True:
            root = Path(options.get("default_root_dir") or ".") / "lightning_logs"
            logger = _loggers(root, experiment, run) if not dry else None
        added: list[Callback] = [KeepMemory()] if keep_memory else []
        if not dry:
            added += [SampleImages(), PretextImages(), FinalMetrics(), ConfusionMatrix(), PredictionWriter()]
        if enable_checkpointing is not False and not dry:
            added += [BestCheckpoint(), LastCheckpoint()]
        own_bar = any(isinstance(callback, ProgressBar) for callback in given)
        if enable_progress_bar is not False and not own_bar and not options.get("barebones"):
            added.append(UnhurriedProgressBar())
        added = [a for a in added if not any(type(a) is type(g) for g in given)]  # the user's own one counts
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins] if plugins is not None else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        # Lightning cannot know that these streams resume exactly: their position is in the datamodule's state
        warnings.filterwarnings(
            "ignore", message=".*ended before the epoch ended and your dataloader is not resumable.*"
        )
        # frozen backbones, teachers and copies of what a network was are so on purpose
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training.*")
        super().__init__(
            logger=logger,
            callbacks=[*given, *added],
            plugins=plugins,
            enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            num_sanity_val_steps=num_sanity_val_steps,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **options,
        )
        pass_over_idle_hooks(self.callbacks)  # type: ignore[attr-defined]
        if type(self.profiler) is PassThroughProfiler:  # type: ignore[has-type]
            self.profiler = NoProfiler()


STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def pass_over_idle_hooks(callbacks: list[Callback]) -> None:
    """Set the hooks of a training step that a callback does not define to None, which Lightning passes over.

    Calling one that does nothing takes more than a microsecond, and a step has six of them for each callback.
    """
    for callback in callbacks:
        for name in STEP_HOOKS:
            if getattr(type(callback), name) is getattr(Callback, name) and name not in vars(callback):
                setattr(callback, name, None)


class NoProfiler(PassThroughProfiler):
    """What does not profile, for a fifth of the time: Lightning enters four dozen contexts of it in a step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """A context that does nothing."""
        return NOTHING


NOTHING = nullcontext()


def _loggers(root: Path, experiment: str, run: str | None) -> list[Logger]:
    if run is None:
        board = TensorBoardRun(root, experiment)
    else:
        folder = Path(run)
        if not folder.is_dir():
            raise ConfigurationError(f"Expected `--trainer.run` to be the folder of a run, but '{run}' is none.")
        folder = folder.resolve()
        board = TensorBoardRun(folder.parent.parent, folder.parent.name, folder.name)
    return [board, AppendingCSVLogger(board)]
