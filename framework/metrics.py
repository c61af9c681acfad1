"""Metrics that torchmetrics does not have, and the set that every test reports."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.utilities import dim_zero_cat

from framework.functional import linear_probe, nearest_neighbour_scores, unbiased_mmd

ProbePart = Literal["bank", "evaluated"]


def test_metrics(num_classes: int) -> MetricCollection:
    """Accuracy, mean accuracy of the classes, macro-F1 and expected calibration error (15 bins), named ``test/…``.

    They take logits ``[N, K]`` and class indices ``[N]``.
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "mean_class_accuracy": MulticlassAccuracy(num_classes, average="macro"),
            "macro_f1": MulticlassF1Score(num_classes, average="macro"),
            "calibration_error": CalibrationError(num_classes, n_bins=15),
        },
        prefix="test/",
    )


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits.

    torchmetrics' own takes a batch of logits that all happen to lie in [0, 1] for probabilities.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions.

        Args:
            preds: logits, shape ``[N, K]``.
            target: class indices, shape ``[N]``.
        """
        super().update(preds.float().softmax(dim=1), target)


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


class DomainDiscrepancy(Metric):
    """Unbiased squared maximum mean discrepancy of two domains' features (Gretton et al., JMLR 2012, eq. 3).

    A metric and not a logged scalar, so that every process takes part in its reduction, however few images it has.

    Args:
        most: features kept of each domain and process; the first ones.
    """

    full_state_update = False
    higher_is_better = False
    source: list[Tensor]
    target: list[Tensor]

    def __init__(self, most: int = 512, **options: Any) -> None:
        super().__init__(**options)
        self.most = most
        self.add_state("source", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, domain: Literal["source", "target"]) -> None:
        """Add features ``[N, D]`` of a domain."""
        kept = self.source if domain == "source" else self.target
        room = self.most - sum(len(part) for part in kept)
        if room > 0:
            kept.append(features[:room].float())

    def compute(self) -> Tensor:
        """The estimate, a 0-d tensor; NaN where a domain has fewer than two images."""
        source, target = dim_zero_cat(self.source), dim_zero_cat(self.target)
        if min(len(source), len(target)) < 2:
            return torch.full((), float("nan"), device=source.device)
        return unbiased_mmd(source, target)


class ProbeAccuracy(Metric):
    """Accuracy of a linear classifier of some features, and of a vote of their nearest neighbours.

    Both know the features and labels of a bank of images, and are measured on others; see
    :func:`~framework.functional.linear_probe` and :func:`~framework.functional.nearest_neighbour_scores`.

    Args:
        num_classes: number of classes ``K``.
        neighbours: how many vote.
    """

    full_state_update = False
    higher_is_better = True
    bank: list[Tensor]
    bank_labels: list[Tensor]
    evaluated: list[Tensor]
    evaluated_labels: list[Tensor]

    def __init__(self, num_classes: int, neighbours: int = 20, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes, self.neighbours = num_classes, neighbours
        for name in ("bank", "bank_labels", "evaluated", "evaluated_labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor, part: ProbePart) -> None:
        """Add features ``[N, C]`` and class indices ``[N]`` of one of the two."""
        self._states(part)[0].append(features.float())
        self._states(part)[1].append(labels)

    def _states(self, part: str) -> tuple[list[Tensor], list[Tensor]]:
        return getattr(self, part), getattr(self, f"{part}_labels")

    def compute(self) -> dict[str, Tensor]:
        """Shares of the evaluated images, of all processes, that are classified rightly, 0-d tensors by name."""
        bank, bank_labels, images, labels = (
            dim_zero_cat(state) for part in ("bank", "evaluated") for state in self._states(part)
        )
        weight, bias = linear_probe(bank, bank_labels, self.num_classes)
        scores = {
            "linear_probe_accuracy": images.double() @ weight.T + bias,
            "knn_accuracy": nearest_neighbour_scores(images, bank, bank_labels, self.num_classes, self.neighbours),
        }
        return {
            name: multiclass_accuracy(value, labels, self.num_classes, average="micro")
            for name, value in scores.items()
        }


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
    return entropy
