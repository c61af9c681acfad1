"""Joint distribution optimal transport: target images are moved to source images that look alike and share the class.

Damodaran et al., "DeepJDOT: Deep Joint Distribution Optimal Transport for Unsupervised Domain Adaptation", ECCV 2018,
arXiv:1803.10081.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from framework.errors import ConfigurationError, at_least_zero
from framework.functional import check_transport_package, exact_coupling, sinkhorn_coupling, squared_distances
from framework.functional.precision import full_precision
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs

Transport = Literal["sinkhorn", "exact"]


class JointDistributionOptimalTransportLoss(AlignmentLoss):
    """The cost of moving the source to the target, in features and classes at once (Damodaran 2018, eq. 4 to 6).

    Moving source image ``i`` to target image ``j`` costs ``feature_weight * |features_i - features_j| ** 2 +
    label_weight * -log p_j[label_i]``. The coupling of least cost is found first, without a gradient; the loss is what
    moves cost by it, ``sum over i, j of coupling_ij * cost_ij``.

    Diagnostics: ``feature_cost`` and ``label_cost``, the two parts before their weights; ``transport_agreement``, the
    share of the mass that is moved to a target image whose predicted class is the source's label (near 1 where the
    coupling respects the classes); ``coupling_spread``, 0 where each image is moved to one, 1 where each is moved to
    all, so that the coupling says nothing.

    Args:
        feature_weight: alpha of the paper.
        label_weight: lambda_t of the paper.
        transport: ``sinkhorn``, or ``exact`` as in the paper by the package POT, on the host: that waits for the device
            in each step, and breaks a compiled graph.
        entropic_regularization: of ``sinkhorn``, as a multiple of the mean cost.
        iterations: of ``sinkhorn``.
    """

    term = "deep_jdot"

    def __init__(
        self,
        *,
        feature_weight: float = 0.001,
        label_weight: float = 0.0001,
        transport: Transport = "sinkhorn",
        entropic_regularization: float = 0.05,
        iterations: int = 50,
    ) -> None:
        super().__init__()
        at_least_zero("--model.feature_weight", feature_weight)
        at_least_zero("--model.label_weight", label_weight)
        if feature_weight == label_weight == 0:
            raise ConfigurationError(
                "Expected `--model.feature_weight` or `--model.label_weight` to be above 0, but both are 0."
            )
        if transport not in ("sinkhorn", "exact"):
            raise ConfigurationError(
                f"Expected `--model.transport` to be 'sinkhorn' or 'exact', but got {transport!r}."
            )
        if transport == "exact":
            check_transport_package()
        if entropic_regularization <= 0:
            raise ConfigurationError(
                f"Expected `--model.entropic_regularization` to be above 0, but got {entropic_regularization}."
            )
        if iterations < 1:
            raise ConfigurationError(f"Expected `--model.iterations` to be at least 1, but got {iterations}.")
        self.feature_weight, self.label_weight = feature_weight, label_weight
        self.transport, self.entropic_regularization, self.iterations = transport, entropic_regularization, iterations

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The transport's cost, a scalar; ``progress`` plays no part."""
        if source.labels is None:
            raise ConfigurationError("Expected the source's `labels`, but got none.")
        feature_cost = squared_distances(source.features, target.features)
        label_cost = _label_cost(source.labels, target.logits)
        cost = self.feature_weight * feature_cost + self.label_weight * label_cost  # [N, M]
        coupling = self._coupling(cost)
        larger, smaller = max(cost.shape), min(cost.shape)
        shares = coupling * larger  # of an image of the larger sample: 1 in one place, or 1 / smaller everywhere
        self.diagnostics = {
            "feature_cost": (coupling * feature_cost.detach()).sum(),
            "label_cost": (coupling * label_cost.detach()).sum(),
            "transport_agreement": (coupling * (source.labels[:, None] == target.logits.argmax(dim=1))).sum(),
            "coupling_spread": -torch.special.xlogy(shares, shares).sum() / larger / max(math.log(smaller), 1e-9),
        }
        return (coupling * cost).sum()

    def _coupling(self, cost: Tensor) -> Tensor:
        if self.transport == "exact":
            coupling: Tensor = exact_coupling(cost)
            return coupling
        return sinkhorn_coupling(cost, self.entropic_regularization, self.iterations)

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """A coupling of all with all draws every target image to the mean of the source."""
        spread = means.get("train/coupling_spread", 0.0)
        if progress >= 0.2 and spread > 0.95:
            yield (
                "coupling",
                f"the coupling moves each image to nearly all others, {spread:.2f} of the largest entropy "
                "(`train/coupling_spread`), and so says nothing. Lower `--model.entropic_regularization`.",
            )


@full_precision
def _label_cost(labels: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of each target prediction with each source label, ``[N, M]``."""
    return -logits.log_softmax(dim=1)[:, labels].T


class DeepJDOT(DomainAdaptation):
    """Deep joint distribution optimal transport (Damodaran et al., ECCV 2018).

    Args:
        num_classes: number of classes ``K``.
        feature_weight: weight alpha of the squared distance of the features in the cost.
        label_weight: weight lambda_t of the cross-entropy of target prediction and source label in the cost.
        transport: ``sinkhorn``, or ``exact`` as in the paper: needs ``pip install 'transfer-framework[transport]'``,
            waits for the device in each step, and breaks a compiled graph.
        entropic_regularization: of ``sinkhorn``, as a multiple of the mean cost.
        iterations: of ``sinkhorn``.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        feature_weight: float = 0.001,
        label_weight: float = 0.0001,
        transport: Transport = "sinkhorn",
        entropic_regularization: float = 0.05,
        iterations: int = 50,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.alignment = JointDistributionOptimalTransportLoss(
            feature_weight=feature_weight,
            label_weight=label_weight,
            transport=transport,
            entropic_regularization=entropic_regularization,
            iterations=iterations,
        )
