"""Batch nuclear-norm maximisation: predictions of target images that are certain and of many classes.

Cui et al., "Towards Discriminability and Diversity: Batch Nuclear-norm Maximization under Label Insufficient
Situations", CVPR 2020, arXiv:2003.12237.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import full_precision, nuclear_norm, prediction_entropy
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs

Normalization = Literal["batch", "min_batch_classes"]


class BatchNuclearNormLoss(AlignmentLoss):
    """Minus the nuclear norm of the target's probabilities ``[M, K]`` over the batch size (Cui 2020).

    It asks nothing of the source. The norm is large where rows are certain (as the Frobenius norm) and where they are
    not all of one class (as the rank). Diagnostics: ``relative_nuclear_norm``, the norm over the largest one that a
    batch of that size can have, ``sqrt(M min(M, K))``: 1 where all predictions are certain and spread evenly over the
    classes, below ``1 / sqrt(min(M, K))`` where all are alike; and ``target_entropy``, the mean entropy of the
    predictions in nats.

    Args:
        normalization: divide by the ``batch`` size ``M`` (the paper) or by the number of singular values, ``min(M,
            K)`` (the paper's code and DeepDA: a stronger loss where there are fewer classes than images).
    """

    term = "bnm"
    is_task = True

    def __init__(self, normalization: Normalization = "batch") -> None:
        super().__init__()
        if normalization not in ("batch", "min_batch_classes"):
            raise ConfigurationError(
                f"Expected `--model.normalization` to be 'batch' or 'min_batch_classes', but got {normalization!r}."
            )
        self.normalization = normalization

    @full_precision
    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """Minus the normalised norm, a scalar; ``source`` and ``progress`` play no part."""
        images, singular_values = len(target.logits), min(target.logits.shape)
        norm = nuclear_norm(target.logits.softmax(dim=1))
        self.diagnostics = {
            "relative_nuclear_norm": norm.detach() / math.sqrt(images * singular_values),
            "target_entropy": prediction_entropy(target.logits.detach()).mean(),
        }
        return -norm / (images if self.normalization == "batch" else singular_values)


class BNM(DomainAdaptation):
    """Batch nuclear-norm maximisation (Cui et al., CVPR 2020).

    Args:
        num_classes: number of classes ``K``.
        normalization: divide the norm by the ``batch`` size (the paper) or by ``min_batch_classes`` (its code).
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(self, num_classes: int, *, normalization: Normalization = "batch", **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.alignment = BatchNuclearNormLoss(normalization)
