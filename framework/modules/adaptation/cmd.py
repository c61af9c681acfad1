"""Central moment discrepancy: equal means and central moments of each feature, up to the fifth.

Zellinger et al., "Central Moment Discrepancy (CMD) for Domain-Invariant Representation Learning", ICLR 2017.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import central_moment_discrepancies, full_precision
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs

LENGTHS = {"sigmoid": 1.0, "tanh": 2.0, "none": 1.0}


class CentralMomentDiscrepancyLoss(AlignmentLoss):
    """Distance of the mean and of the central moments of the activated features (Zellinger 2017, section 3).

    The discrepancy is defined for activations in an interval, which the paper's sigmoid layer has and a bottleneck's
    output has not. So the loss, and it alone, sees the features through a bounded activation; the head does not.

    Diagnostics: ``cmd``, the loss; ``mean_discrepancy``, its first term; ``activation_slope``, how steep the activation
    is at the features, on average and relative to its steepest (1 at a feature of 0; near 0 where all are saturated and
    nothing is learned; always 1 for ``none``).

    Args:
        moments: how many terms, of which the first is the mean.
        activation: ``sigmoid`` (the paper; an interval of length 1), ``tanh`` (2) or ``none``, for features that the
            network bounds itself, to an interval of length 1.
    """

    term = "cmd"

    def __init__(self, moments: int = 5, activation: Literal["sigmoid", "tanh", "none"] = "sigmoid") -> None:
        super().__init__()
        if moments < 1:
            raise ConfigurationError(f"Expected `--model.moments` to be at least 1, but got {moments}.")
        if activation not in LENGTHS:
            raise ConfigurationError(
                f"Expected `--model.activation` to be 'sigmoid', 'tanh' or 'none', but got {activation!r}."
            )
        self.moments, self.activation = moments, activation

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The loss, a scalar; ``progress`` plays no part."""
        activated = [_activate(outputs.features, self.activation) for outputs in (source, target)]
        terms = central_moment_discrepancies(activated[0], activated[1], self.moments, LENGTHS[self.activation])
        loss = terms.sum()
        slopes = [_slope(values.detach(), self.activation).mean() for values in activated]
        self.diagnostics = {
            "cmd": loss.detach(),
            "mean_discrepancy": terms.detach()[0],
            "activation_slope": (slopes[0] + slopes[1]) / 2,
        }
        return loss

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """Saturation."""
        slope = means.get("train/activation_slope", 1.0)
        if slope < 0.05:
            yield (
                "cmd",
                f"the features saturate the {self.activation} of the loss: its slope is {slope:.1%} of its steepest "
                "(`train/activation_slope`), and hardly any gradient comes through. Set "
                "`--model.bottleneck_normalization batch`, or lower `--model.learning_rate`.",
            )


@full_precision
def _activate(features: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return features
    return features.sigmoid() if activation == "sigmoid" else features.tanh()


def _slope(values: Tensor, activation: str) -> Tensor:
    """The derivative over the largest one, from the activation's own values."""
    if activation == "none":
        return values.new_ones(1)
    centred = 2.0 * values - 1.0 if activation == "sigmoid" else values
    return 1.0 - centred.square()  # of the sigmoid s: 4 s (1 - s) = 1 - (2 s - 1)^2


class CMD(DomainAdaptation):
    """Central moment discrepancy (Zellinger et al., ICLR 2017), on the bottleneck's features.

    Args:
        num_classes: number of classes ``K``.
        moments: how many moments are aligned, the mean first.
        activation: through which the loss sees the features, ``sigmoid``, ``tanh`` or ``none``: the discrepancy is
            defined for bounded activations.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        moments: int = 5,
        activation: Literal["sigmoid", "tanh", "none"] = "sigmoid",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.alignment = CentralMomentDiscrepancyLoss(moments, activation)
