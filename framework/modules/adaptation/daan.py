"""Dynamic adversarial adaptation: one discriminator of the domains and one for each class, weighed by how far apart
the domains are as a whole and within the classes.

Yu et al., "Transfer Learning with Dynamic Adversarial Adaptation Network", ICDM 2019, arXiv:1909.08184.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework.errors import in_range
from framework.functional import full_precision
from framework.modules.adaptation.base import DomainAdaptation
from framework.modules.adaptation.dann import (
    AdversarialLoss,
    DomainWeighting,
    Normalization,
    ReversalSchedule,
    SourceLabel,
    at_least_one,
    domain_cross_entropy,
    domain_errors,
    one_of,
)
from framework.networks import NetworkOutputs

DynamicFactor = Literal["global_share", "local_share"]

TINY = torch.finfo(torch.float32).tiny
SMALL = 1e-6  # distances of 0 give a factor of a half


class ClassDiscriminators(nn.Module):
    """``K`` discriminators at once: features ``[N, D]`` and probabilities ``[N, K]`` to logits ``[N, K]``.

    Discriminator ``k`` has two hidden layers and sees ``probabilities[:, k] * features`` (as MADA, Pei et al., AAAI
    2018, eq. 4). No batch norm: of a class that no image has it would blow up what is next to 0.

    Args:
        num_features: width ``D``.
        num_classes: number of discriminators ``K``.
        hidden_features: width of the hidden layers of each.
        dropout: probability, behind the hidden layers.
    """

    def __init__(self, num_features: int, num_classes: int, hidden_features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.first = nn.Linear(num_features, num_classes * hidden_features)  # all classes' first layers in one
        self.second_weight = nn.Parameter(torch.empty(num_classes, hidden_features, hidden_features))
        self.second_bias = nn.Parameter(torch.empty(num_classes, 1, hidden_features))
        self.last_weight = nn.Parameter(torch.empty(num_classes, hidden_features, 1))
        self.last_bias = nn.Parameter(torch.empty(num_classes, 1, 1))
        self.dropout = nn.Dropout(dropout)
        bound = hidden_features**-0.5  # that of nn.Linear
        for parameter in (self.second_weight, self.second_bias, self.last_weight, self.last_bias):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, features: Tensor, probabilities: Tensor) -> Tensor:
        # W (p f) + b = p (W f) + b: one product for all classes
        product = F.linear(features, self.first.weight).view(len(features), self.num_classes, -1)  # [N, K, H]
        hidden = probabilities.unsqueeze(2) * product + self.first.bias.view(self.num_classes, -1)
        hidden = self.dropout(hidden.relu()).transpose(0, 1)  # [K, N, H], float32 by the probabilities
        hidden = hidden.to(self.second_weight.dtype)  # which may be bfloat16
        hidden = self.dropout((hidden @ self.second_weight + self.second_bias).relu())
        logits: Tensor = hidden @ self.last_weight + self.last_bias
        return logits.squeeze(2).T


class DynamicAdversarialLoss(AdversarialLoss):
    """``(1 - w) L_global + w L_local`` behind a gradient reversal (Yu 2019, section III).

    ``L_global`` is DANN's; ``L_local`` the sum over the classes of the loss of the class's discriminator, which sees
    the features times the predicted probability of the class (no gradient flows into that). The dynamic factor is ``w =
    d_global / (d_global + mean over classes of d_class)`` with the A-distances ``d = 2 (1 - 2 error)`` of the
    discriminators. As the error the paper's code takes the loss, in nats, which makes distances negative where the
    discriminator guesses; here it is the share of wrong decisions, as in the definition of the A-distance (Ben-David et
    al., NIPS 2006), whatever the losses are multiplied by, and distances below 0 count as 0. Those of a class weigh the
    images by its predicted probability.

    The errors are exponential means over the training's batches (the paper takes those of the last epoch), without a
    bias towards the start; they are buffers, and stand still in evaluation mode.

    Diagnostics: ``dynamic_factor`` (0 for DANN alone, 1 for the classes alone), ``global_distance`` and
    ``class_distance`` (the mean over classes), each from 0 where nobody can tell the domains apart to 2,
    ``local_loss`` (nats per image and class), and those of :class:`AdversarialLoss`, of the global discriminator.

    Args:
        num_features: width ``D`` of the features.
        num_classes: number of classes ``K``.
        dynamic_factor: ``global_share`` is ``w`` as above, as the paper prints it; ``local_share`` is ``1 -`` that, as
            the authors' code (and DeepDA) has it: the larger distance then gets the larger weight.
        error_memory: share of the mean errors that a batch leaves as it is, in [0, 1).
        hidden_features: width of the global discriminator's two hidden layers.
        class_features: width of the two hidden layers of each class's discriminator.
        normalization: in the global discriminator: ``batch``, ``dropout`` or ``none``; with ``dropout`` the classes'
            have it too.
        domain_weighting: ``mean`` of the two domains' mean losses (the paper) or their ``sum``.
        source_label: 1 or 0; learns the same.
        reversal_schedule: ``sigmoid``, ``linear`` or ``constant``.
        reversal_gamma: steepness of the sigmoid ``2 / (1 + exp(-gamma * progress)) - 1``.
        reversal_maximum: what the coefficient is multiplied by.
    """

    term = "daan"

    error_sums: Tensor
    error_weights: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        dynamic_factor: DynamicFactor = "global_share",
        error_memory: float = 0.99,
        hidden_features: int = 1024,
        class_features: int = 128,
        normalization: Normalization = "batch",
        domain_weighting: DomainWeighting = "mean",
        source_label: SourceLabel = 1,
        reversal_schedule: ReversalSchedule = "sigmoid",
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 1.0,
    ) -> None:
        one_of("--model.dynamic_factor", dynamic_factor, get_args(DynamicFactor))
        in_range("--model.error_memory", error_memory, 0, 1)
        at_least_one("--model.class_discriminator_features", class_features)
        super().__init__(
            num_features,
            hidden_features=hidden_features,
            normalization=normalization,
            domain_weighting=domain_weighting,
            source_label=source_label,
            reversal_schedule=reversal_schedule,
            reversal_gamma=reversal_gamma,
            reversal_maximum=reversal_maximum,
        )
        self.class_discriminators = ClassDiscriminators(
            num_features, num_classes, class_features, 0.5 if normalization == "dropout" else 0.0
        )
        self.dynamic_factor, self.error_memory = dynamic_factor, error_memory
        # of source and target: each class's discriminator and, last, the global one
        self.register_buffer("error_sums", torch.zeros(2, num_classes + 1))
        self.register_buffer("error_weights", torch.zeros(2, num_classes + 1))

    def forward(self, source: NetworkOutputs, target: NetworkOutputs, progress: Tensor) -> Tensor:
        """The discriminators' loss, a scalar; its gradient reaches the features reversed, and the logits not at all."""
        count = len(source.features)
        features = self.reverse(source, target, progress)
        probabilities = self.probabilities(source, target)
        class_logits = self.class_discriminators(features, probabilities)
        global_logits = self.discriminator(features)
        global_loss, local_loss = self.domain_loss(global_logits, count), self.class_loss(class_logits, count)
        factor = self.factor(torch.cat([class_logits, global_logits.unsqueeze(1)], dim=1), probabilities, count)
        return (1 - factor) * global_loss + factor * local_loss

    @full_precision
    def probabilities(self, source: NetworkOutputs, target: NetworkOutputs) -> Tensor:
        """Predictions ``[N + M, K]``, without a gradient."""
        return torch.cat([source.logits, target.logits]).detach().softmax(dim=1)

    def class_loss(self, logits: Tensor, source_count: int) -> Tensor:
        """The sum over the classes of what ``domain_loss`` is for the global discriminator, a scalar."""
        source = domain_cross_entropy(logits[:source_count], True, self.source_label)
        target = domain_cross_entropy(logits[source_count:], False, self.source_label)
        self.diagnostics["local_loss"] = (source.mean() + target.mean()).detach() / 2
        return self.domain_factor * (source.sum(dim=1).mean() + target.sum(dim=1).mean())

    @torch.no_grad()
    def factor(self, logits: Tensor, probabilities: Tensor, source_count: int) -> Tensor:
        """The dynamic factor, a 0-d tensor, after a batch has been counted if it is one of the training.

        Args:
            logits: of the classes' discriminators and, last, of the global one, ``[N + M, K + 1]``.
            probabilities: ``[N + M, K]``.
            source_count: ``N``.
        """
        if self.training:
            weights = torch.cat([probabilities, torch.ones_like(probabilities[:, :1])], dim=1)
            parts = (slice(source_count), slice(source_count, None))
            errors = [domain_errors(logits[part], i == 0, self.source_label) for i, part in enumerate(parts)]
            sums = [(weights[part] * error).mean(dim=0) for part, error in zip(parts, errors, strict=True)]
            means = [weights[part].mean(dim=0) for part in parts]
            self.error_sums.lerp_(torch.stack(sums).to(self.error_sums.dtype), 1 - self.error_memory)
            self.error_weights.lerp_(torch.stack(means).to(self.error_weights.dtype), 1 - self.error_memory)
        # before the first batch all distances are 2, and the factor is a half
        error = (self.error_sums / self.error_weights.clamp_min(TINY)).mean(dim=0)
        distances = (2 * (1 - 2 * error)).clamp_min(0)
        between_domains, within_classes = distances[-1], distances[:-1].mean()
        share = (between_domains + SMALL) / (between_domains + within_classes + 2 * SMALL)
        factor = share if self.dynamic_factor == "global_share" else 1 - share
        self.diagnostics["dynamic_factor"] = factor
        self.diagnostics["global_distance"], self.diagnostics["class_distance"] = between_domains, within_classes
        return factor


class DAAN(DomainAdaptation):
    """Dynamic adversarial adaptation network (Yu et al., ICDM 2019).

    Args:
        num_classes: number of classes ``K``.
        dynamic_factor: weight of the classes' discriminators: ``global_share``, the share of the distance between the
            domains in the sum of that and the one within the classes (the paper), or ``local_share``, the other's (the
            authors' code, DeepDA).
        error_memory: share of the mean errors, behind the distances, that a batch leaves as it is, in [0, 1).
        discriminator_features: width of the global discriminator's two hidden layers.
        class_discriminator_features: width of the two hidden layers of each class's discriminator.
        discriminator_normalization: ``batch``, ``dropout`` or ``none``; the classes' have no batch norm.
        domain_weighting: ``mean`` of the two domains' mean losses (the paper) or their ``sum``.
        source_label: the discriminators' name for the source, 1 or 0; learns the same.
        reversal_schedule: of the reversal coefficient: ``sigmoid``, ``linear`` or ``constant``.
        reversal_gamma: steepness of the sigmoid.
        reversal_maximum: the coefficient's final value.
        options: those of :class:`~framework.modules.adaptation.DomainAdaptation`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        dynamic_factor: DynamicFactor = "global_share",
        error_memory: float = 0.99,
        discriminator_features: int = 1024,
        class_discriminator_features: int = 128,
        discriminator_normalization: Normalization = "batch",
        domain_weighting: DomainWeighting = "mean",
        source_label: SourceLabel = 1,
        reversal_schedule: ReversalSchedule = "sigmoid",
        reversal_gamma: float = 10.0,
        reversal_maximum: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.alignment = DynamicAdversarialLoss(
            self.num_features,
            num_classes,
            dynamic_factor=dynamic_factor,
            error_memory=error_memory,
            hidden_features=discriminator_features,
            class_features=class_discriminator_features,
            normalization=discriminator_normalization,
            domain_weighting=domain_weighting,
            source_label=source_label,
            reversal_schedule=reversal_schedule,
            reversal_gamma=reversal_gamma,
            reversal_maximum=reversal_maximum,
        )
