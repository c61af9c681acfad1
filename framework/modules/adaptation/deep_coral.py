"""Correlation alignment: equal covariances of the domains' logits.

Sun and Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation", ECCV Workshops 2016.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from framework.errors import ConfigurationError, at_least_zero
from framework.functional import coral
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.modules.adaptation.batches import check_batch_sizes
from framework.networks import NetworkOutputs


class CorrelationAlignmentLoss(AlignmentLoss):
    """Squared Frobenius distance of the two covariance matrices over ``4 d^2`` (Sun & Saenko 2016, eq. 1).

    Diagnostics: ``coral``, the loss; ``variance_ratio``, the target's total variance over the source's (1 where the
    scales agree).

    Args:
        layer: what is aligned, ``logits`` (``d = K``; the paper's fc8) or ``features`` (``d = D``; DeepDA).
        mean_weight: of the squared distance of the means, over ``d``, which the covariances do not see: 0 in the paper;
            TLlib's loss is 4 times this one with 0.25.
    """

    term = "coral"

    def __init__(self, layer: Literal["logits", "features"] = "logits", mean_weight: float = 0.0) -> None:
        super().__init__()
        if layer not in ("logits", "features"):
            raise ConfigurationError(f"Expected `--model.layer` to be 'logits' or 'features', but got {layer!r}.")
        at_least_zero("--model.mean_weight", mean_weight)
        self.layer, self.mean_weight = layer, mean_weight

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The loss, a scalar; ``progress`` plays no part."""
        aligned = (source.logits, target.logits) if self.layer == "logits" else (source.features, target.features)
        loss = coral(*aligned, mean_weight=self.mean_weight)
        source_variance, target_variance = (x.detach().float().var(dim=0).sum() for x in aligned)
        self.diagnostics = {
            "coral": loss.detach(),
            "variance_ratio": target_variance / source_variance.clamp(min=1e-30),
        }
        return loss

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """Scales that stay apart."""
        ratio = means.get("train/variance_ratio", 1.0)
        if progress >= 0.5 and not 0.25 < ratio < 4.0:
            yield (
                "coral",
                f"the target's {self.layer} have {ratio:.2g} times the source's variance (`train/variance_ratio`): the "
                "covariances are not aligned. Raise `--model.trade_off`.",
            )


class DeepCORAL(DomainAdaptation):
    """Deep correlation alignment (Sun & Saenko, ECCV Workshops 2016).

    Args:
        num_classes: number of classes ``K``.
        layer: what is aligned, ``logits`` (the paper's last layer, fc8) or ``features``, the bottleneck's (DeepDA). The
            loss is divided by the squared width, so features need a far larger ``trade_off``.
        mean_weight: of a term for the means, which the covariances do not see; 0 in the paper.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        layer: Literal["logits", "features"] = "logits",
        mean_weight: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.alignment = CorrelationAlignmentLoss(layer, mean_weight)

    def prepare_data(self) -> None:
        """Refuse batches without a covariance."""
        super().prepare_data()
        check_batch_sizes(self, at_least=2, why="whose covariance DeepCORAL aligns")
