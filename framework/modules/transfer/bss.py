"""Batch spectral shrinkage: features without the small singular values that carry what does not transfer.

Chen et al., "Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe Transfer Learning",
NeurIPS 2019.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.functional import smallest_squared_singular_values
from framework.modules.transfer.regularized import RegularizedTransfer
from framework.networks import NetworkOutputs


class BSS(RegularizedTransfer):
    """Batch spectral shrinkage (Chen et al., NeurIPS 2019): the squares of the batch's smallest singular values.

    Of the features ``[N, D]`` that the head sees, ``min(N, D)`` singular values in all; those of each process's own
    batch. Diagnostics: ``spectral_share``, the penalised share of the sum of all squares.

    Args:
        num_classes: number of classes ``K``.
        trade_off: weight of the sum; 0.001 in the paper.
        singular_values: how many are penalised, ``k``; 1 in the paper.
        options: those of :class:`~framework.modules.transfer.TransferClassifier`.
    """

    def __init__(self, num_classes: int, *, trade_off: float = 0.001, singular_values: int = 1, **options: Any) -> None:
        super().__init__(num_classes, trade_off=trade_off, **options)
        if singular_values < 1:
            raise ConfigurationError(f"Expected `--model.singular_values` to be at least 1, but got {singular_values}.")
        self.singular_values = singular_values

    def regularization(self, outputs: NetworkOutputs, batch: LabelledBatch) -> Tensor:
        """The sum of the squares of the smallest singular values."""
        penalty = smallest_squared_singular_values(outputs.features, self.singular_values)
        total = outputs.features.detach().float().square().sum()
        self.diagnostics = {"spectral_share": penalty.detach() / total.clamp(min=1e-12)}
        return penalty
