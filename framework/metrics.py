"""Metrics that torchmetrics does not have, and the set that every test reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score


def test_metrics(num_classes: int) -> MetricCollection:
    """Accuracy, mean accuracy of the classes, macro-F1 and expected calibration error (15 bins), named ``test/…``."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "mean_class_accuracy": MulticlassAccuracy(num_classes, average="macro"),
            "macro_f1": MulticlassF1Score(num_classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
        },
        prefix="test/",
    )


class InformationMaximization(Metric):
    """Entropy of the mean prediction minus the mean entropy of the predictions, in nats; needs no labels.

    ``H(mean_i p_i) - mean_i H(p_i)``, from 0 (every image predicted alike) to ``log K`` (confident and spread evenly
    over the classes). Krause, Perona & Gomes, "Discriminative clustering by regularized information maximization",
    NeurIPS 2010. Biased where the target's classes are not balanced.
    """

    full_state_update = False
    higher_is_better = True
    probabilities: Tensor
    entropies: Tensor
    count: Tensor

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("probabilities", torch.zeros(num_classes), dist_reduce_fx="sum")
        self.add_state("entropies", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add predictions.

        Args:
            logits: shape ``[N, K]``.
        """
        probabilities = logits.float().softmax(dim=1)
        self.probabilities += probabilities.sum(dim=0)
        self.entropies += _entropy(probabilities).sum()
        self.count += len(logits)

    def compute(self) -> Tensor:
        """The score over all predictions added, a 0-d tensor."""
        score: Tensor = self.marginal_entropy() - self.entropies / self.count
        return score

    def marginal_entropy(self) -> Tensor:
        """Entropy of the mean prediction: near 0 where the predictions have collapsed to one class."""
        return _entropy(self.probabilities / self.count)


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
    return entropy
