"""The progress bar: how often it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framework import ImageFolderDataModule, ResidualClassifier, Trainer
from framework.callbacks import UnhurriedProgressBar, progress_bar


class Drawn(UnhurriedProgressBar):
    """Notes the batches at which it is drawn."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=2)
        self.batches: list[int] = []

    def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
        if self.train_progress_bar.n not in self.batches:  # once more at the end of the epoch
            self.batches.append(int(self.train_progress_bar.n))
        return super().get_metrics(trainer, pl_module)


@pytest.mark.parametrize(
    ("seconds_a_batch", "drawn"),
    [(0.001, [2, 11]), (0.03, [2, 6, 10, 11]), (1.0, [2, 4, 6, 8, 10, 11])],
)
def test_not_more_often_than_one_can_see(
    images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds_a_batch: float,
    drawn: list[int],
) -> None:
    """And after the last batch, whenever that is."""
    images(tmp_path, ["a", "b"], count=12)
    data = ImageFolderDataModule(str(tmp_path), batch_size=2, steps_per_epoch=11, image_size=16, num_workers=0)
    bar = Drawn()
    now = iter(range(1000))
    monkeypatch.setattr(progress_bar, "time", SimpleNamespace(monotonic=lambda: 9.0 + seconds_a_batch * next(now)))
    Trainer(
        max_epochs=1, logger=False, callbacks=[bar], enable_checkpointing=False, limit_val_batches=0, accelerator="cpu"
    ).fit(ResidualClassifier(2, backbone="resnet8"), data)
    assert bar.batches == drawn
