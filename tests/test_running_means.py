"""Running means: what a row holds, and when there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import contract
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor

from framework import DANN, DomainPairDataModule, ImageFolderDataModule, ResidualClassifier, Trainer
from framework.functional import marginal_entropy
from framework.running_means import AT_ONCE, RunningMeans


class Rows(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name, version = "rows", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        pass


def fake(logger: Rows, every: int = 3) -> Any:
    loop = SimpleNamespace(_batches_that_stepped=0, _should_accumulate=lambda: False)
    return SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop), log_every_n_steps=every, loggers=[logger])


def test_means_since_the_last_row() -> None:
    logger, means = Rows(), RunningMeans()
    trainer = fake(logger)
    for step in range(8):
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        means.add({"train/a": torch.tensor(float(step))})
        if step % 2:
            means.add({"train/b": torch.tensor(10.0 * step)})
        means.write(trainer)
    assert logger.rows == [(2, {"train/a": 1.0, "train/b": 10.0}), (5, {"train/a": 4.0, "train/b": 40.0})]


def test_means_of_many_steps() -> None:
    """More than are kept: sums are made on the way."""
    logger, means = Rows(), RunningMeans()
    trainer = fake(logger, every=50)
    for step in range(50):
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        means.add({"train/a": torch.tensor(float(step)), "train/b": torch.tensor(step % 2)})
        if step >= 40:
            means.add({"train/late": torch.tensor(1.0 + step)})
        assert len(means._kept) < AT_ONCE
        means.write(trainer)
    assert logger.rows == [(49, {"train/a": 24.5, "train/b": 0.5, "train/late": 45.5})]


def test_measured_some_steps_at_once() -> None:
    """The mean of each step's value, also where a step has fewer images."""
    logger, means, expected = Rows(), RunningMeans(), []
    trainer = fake(logger, every=40)
    generator = torch.Generator().manual_seed(0)
    calls: list[int] = []

    def entropy(logits: Tensor) -> Tensor:
        calls.append(len(logits))
        return marginal_entropy(logits)

    for step in range(40):
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        logits = 3 * torch.randn(2 if step == 20 else 5, 3, generator=generator)
        expected.append(float(marginal_entropy(logits)))
        means.add_measured("train/entropy", entropy, logits)
        means.write(trainer)
    ((_, row),) = logger.rows
    assert row == {"train/entropy": pytest.approx(sum(expected) / 40, rel=1e-6)}
    assert calls == [16, 4, 1, 16, 3]


def test_one_row_a_step_where_gradients_accumulate(domains: Path) -> None:
    data = DomainPairDataModule(
        str(domains / "source"), str(domains / "target"), batch_size=4, steps_per_epoch=6, image_size=16, num_workers=0
    )
    logger = Rows()
    Trainer(
        max_epochs=1,
        logger=logger,
        log_every_n_steps=1,
        accumulate_grad_batches=3,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    ).fit(DANN(3, backbone="resnet8"), data)
    assert [step for step, row in logger.rows if "train/alignment_loss" in row] == [0, 1]


def test_no_row_without_values() -> None:
    logger = Rows()
    RunningMeans().write(fake(logger, every=1))
    assert logger.rows == []


@pytest.mark.parametrize("every", [1, 2])
def test_rows_of_a_run(images: Callable[..., Path], tmp_path: Path, every: int) -> None:
    """A row every so many optimizer steps, with the loss, too."""
    images(tmp_path, ["a", "b"], count=12)
    data = ImageFolderDataModule(str(tmp_path), batch_size=2, steps_per_epoch=4, image_size=16, num_workers=0)
    logger = Rows()
    Trainer(
        max_epochs=2,
        logger=logger,
        log_every_n_steps=every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    ).fit(ResidualClassifier(2, backbone="resnet8", schedule="cosine"), data)
    ours = [step for step, row in logger.rows if "train/learning_rate/head" in row]
    losses = [step for step, row in logger.rows if "train/loss" in row]
    assert ours == losses == list(range(every - 1, 8, every))
    rates = [row["train/learning_rate/head"] for _, row in logger.rows if "train/learning_rate/head" in row]
    assert rates[0] > rates[-1] > 0


def test_the_loss_as_callbacks_and_progress_bar_see_it(images: Callable[..., Path], tmp_path: Path) -> None:
    """Of the first, of every tenth and of an epoch's last batch; the loggers have the means of all."""
    images(tmp_path, ["a", "b"], count=12)
    data = ImageFolderDataModule(str(tmp_path), batch_size=2, steps_per_epoch=13, image_size=16, num_workers=0)
    every: list[float] = []
    shown: list[tuple[float, float]] = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            every.append(float(outputs["loss"]))
            seen = [float(values["train/loss"]) for values in (trainer.callback_metrics, trainer.progress_bar_metrics)]
            shown.append((seen[0], seen[1]))

    logger = Rows()
    trainer = Trainer(
        max_epochs=1,
        logger=logger,
        callbacks=[Seen()],
        log_every_n_steps=4,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(ResidualClassifier(2, backbone="resnet8"), data)
    due = [0] * 10 + [10] * 2 + [12]
    assert shown == [(pytest.approx(every[i]), pytest.approx(every[i])) for i in due]
    means = [row["train/loss"] for _, row in logger.rows if "train/loss" in row]
    assert means == pytest.approx([sum(every[i : i + 4]) / 4 for i in (0, 4, 8)])


@pytest.mark.parametrize("method", contract.methods(), ids=lambda method: method.__name__)
def test_a_row_is_the_mean_of_its_steps(method: Any, domains: Path) -> None:
    """Whatever a method measures, and however often a row is written."""
    rows = {}
    for every in (1, 4):
        logger = Rows()
        contract.fit(method, domains, max_steps=4, max_epochs=-1, log_every_n_steps=every, logger=logger)
        rows[every] = [row for _, row in logger.rows if "train/loss" in row]
    assert len(rows[1]) == 4
    (found,) = rows[4]
    values: dict[str, list[float]] = {}
    for row in rows[1]:
        for name in row:
            if "_norm/" not in name and "learning_rate" not in name:  # of the row's own step
                values.setdefault(name, []).append(row[name])
    means = {name: sum(each) / len(each) for name, each in values.items()}
    assert len(means) > 2 or method.__name__ == "SourceOnly"
    assert {name: found[name] for name in means} == pytest.approx(means, rel=1e-4, abs=1e-5)


class Losses(Callback):
    """Keeps each step's."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def test_a_second_run_begins_anew(images: Callable[..., Path], tmp_path: Path) -> None:
    """What the first one has measured since its last row is no part of it."""
    images(tmp_path, ["a", "b"], count=12)
    module = ResidualClassifier(2, backbone="resnet8", learning_rate=0.1)
    rows: list[list[float]] = []
    for steps in (3, 4):
        data = ImageFolderDataModule(str(tmp_path), batch_size=2, steps_per_epoch=steps, image_size=16, num_workers=0)
        logger, losses = Rows(), Losses()
        Trainer(
            max_epochs=1,
            logger=logger,
            callbacks=[losses],
            log_every_n_steps=4,
            enable_checkpointing=False,
            enable_progress_bar=False,
            accelerator="cpu",
        ).fit(module, data)
        rows.append([row["train/loss"] for _, row in logger.rows if "train/loss" in row])
    assert rows == [[], [pytest.approx(sum(losses.values) / 4)]]
