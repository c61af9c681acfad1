"""Information maximisation: certain predictions of target images, spread over the classes.

Krause, Perona & Gomes, "Discriminative Clustering by Regularized Information Maximization", NeurIPS 2010; for
adaptation: Shi & Sha, "Information-Theoretical Learning of Discriminative Clusters for Unsupervised Domain Adaptation",
ICML 2012, and Liang, Hu & Feng, "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for
Unsupervised Domain Adaptation" (SHOT), ICML 2020, arXiv:2002.08546. Without the diversity: Grandvalet & Bengio,
"Semi-supervised Learning by Entropy Minimization", NeurIPS 2004.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from framework.errors import at_least_zero
from framework.functional import marginal_entropy, prediction_entropy
from framework.modules.adaptation.base import AlignmentLoss, DomainAdaptation
from framework.networks import NetworkOutputs


class InformationMaximizationLoss(AlignmentLoss):
    """``mean_i H(p_i) - diversity_weight * H(mean_i p_i)`` of the target's predictions (Liang 2020).

    With weight 1 that is minus the mutual information of image and predicted class, estimated on the batch: the smaller
    the batch against the number of classes, the more the second entropy is underestimated. It asks nothing of the
    source. Diagnostics: ``target_entropy``, the mean entropy of the predictions in nats (``log K`` where they are
    uniform), and ``target_mutual_information``, from 0 to ``log K`` nats.

    Args:
        diversity_weight: of the entropy of the mean prediction; 0 is entropy minimisation, which can be had by giving
            all images one class.
    """

    term = "information_maximization"
    is_task = True

    def __init__(self, diversity_weight: float = 1.0) -> None:
        super().__init__()
        at_least_zero("--model.diversity_weight", diversity_weight)
        self.diversity_weight = diversity_weight

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The loss, a scalar; ``source`` and ``progress`` play no part."""
        entropy, diversity = prediction_entropy(target.logits).mean(), marginal_entropy(target.logits)
        self.diagnostics = {
            "target_entropy": entropy.detach(),
            "target_mutual_information": (diversity - entropy).detach(),
        }
        return entropy - self.diversity_weight * diversity


class InformationMaximization(DomainAdaptation):
    """Information maximisation on the target beside classification on the source; entropy minimisation with weight 0.

    The loss of SHOT (Liang et al., ICML 2020), but with the source at hand and without its pseudo-labels and its frozen
    head.

    Args:
        num_classes: number of classes ``K``.
        diversity_weight: weight of the entropy of the mean prediction; 0 for entropy minimisation.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(self, num_classes: int, *, diversity_weight: float = 1.0, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.alignment = InformationMaximizationLoss(diversity_weight)
