"""The exponential moving average of the weights, which is what a run validates, keeps and tests."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from framework.errors import ConfigurationError


class ExponentialMovingAverage(WeightAveraging):
    """An average of the weights that each optimizer step moves by ``1 - decay`` towards the current ones.

    Validation sees the average; ``last.ckpt`` and ``best.ckpt`` hold it as their weights, so ``test``, ``predict`` and
    ``load_from_checkpoint`` take it without being told, and beside it the current weights, with which a resumed run
    continues exactly. It begins with the weights after the first step.

    Lightning's ``EMAWeightAveraging`` does the same but in three points. It can start late, and until then validates
    and keeps the *initial* weights; here there is no late start. It computes ``decay a + (1 - decay) b``, which is not
    ``a`` where both are equal: frozen weights drift by rounding, and integer buffers (the index tables of a Swin
    transformer, say) are cut off to wrong integers for some decays. Here equal entries stay as they are, and integers
    are copied. And it warns on every run of this framework's modules.

    Args:
        decay: in [0, 1); the average looks back over about ``1 / (1 - decay)`` steps.
        use_buffers: average the buffers too, above all the batch-norm statistics; otherwise they are the current ones.
    """

    def __init__(self, decay: float = 0.999, use_buffers: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigurationError(f"Expected `decay` of ExponentialMovingAverage to be in [0, 1), but got {decay}.")
        self.decay = decay
        self._aside: list[Tensor] = []  # the current weights, while the average is validated
        super().__init__(use_buffers=use_buffers, multi_avg_fn=self._move)

    @torch.no_grad()
    def _move(self, average: list[Tensor], current: list[Tensor], _: Any) -> None:
        if average[0].is_floating_point():  # all of one type and device
            torch._foreach_lerp_(average, current, 1 - self.decay)
        else:
            torch._foreach_copy_(average, current)

    def _moved(self, average: Tensor, current: Tensor, _: Any) -> Tensor:
        return average.lerp(current.to(average.dtype), 1 - self.decay) if average.is_floating_point() else current

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the average, without Lightning's warning of sharded models.

        It is in float32 where the weights are in half precision, in which a small step of the average would be nothing.
        """
        if trainer.precision == "64-true":
            pl_module.double()  # Lightning's strategy does so after this
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*overrides the configure_model.*")
            super().setup(trainer, pl_module, stage)
        if self._average_model is not None and trainer.precision in ("16-true", "bf16-true"):
            # one by one: torch's groups have one type on both sides
            self._average_model.multi_avg_fn, self._average_model.avg_fn = None, self._moved

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in the place of the weights; Lightning swaps them, which rounds it to their type."""
        if self._average_model is not None:
            self._aside = [value.detach().clone() for value in _values(pl_module)]
            _copy(_values(self._average_model.module), pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the current weights."""
        if self._aside:
            _copy(self._aside, pl_module)
            self._aside = []

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both; a module that builds parts of itself from a checkpoint does so in the average too."""
        if self._average_model is None:  # test and predict, where the checkpoint's weights are the average already
            return
        average = self._average_model.module
        assert isinstance(average, L.LightningModule)
        average.on_load_checkpoint(checkpoint)
        if trainer.precision == "64-true":
            average.double()  # what it has just built
        super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _values(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


@torch.no_grad()
def _copy(values: Iterable[Tensor], module: nn.Module) -> None:
    for own, value in zip(_values(module), values, strict=True):
        own.copy_(value)
