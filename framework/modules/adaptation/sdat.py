"""Smooth domain-adversarial training: a classification loss that stays low around the weights, not only at them.

Rangwani et al., "A Closer Look at Smoothness in Domain Adversarial Training", ICML 2022, arXiv:2206.08213, on top of
Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, arXiv:2010.01412.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from framework.batch import DomainBatch
from framework.errors import at_least_zero
from framework.modules.adaptation.alignment_sum import AlignmentSum, WeightedAlignmentSum
from framework.networks.batch_norm import running_statistics_kept


class SDAT(AlignmentSum):
    """Smooth domain-adversarial training (Rangwani et al., ICML 2022), of CDAN or of any sum of losses.

    Every step looks for the worst weights near ``w``: ``w + radius * g / |g|``, where ``g`` is the gradient of the task
    loss at ``w`` (Foret 2021, eq. 2, with p = 2). The gradient of the whole loss, taken there, then moves ``w``. The
    task loss is the cross-entropy on the source together with the terms that are tasks, such as MCC
    (:attr:`AlignmentLoss.is_task`). Smoothing a distance of the domains harms (Rangwani 2022, section 4), so that
    discriminators, and MMD and the like, have no say in where the step looks, and a term's own weights stay in place.
    As in the authors' code, the gradient of these terms is taken at the worst weights too, where the paper's objective
    has it at ``w``: that spares a backward pass.

    A step is two passes forward and two backward, the first without the distances of the domains. Both draw the same
    dropout, and running statistics are those of the first, of the weights that evaluation uses. ``train/loss`` and its
    terms are those at the worst weights; ``train/classification_loss_before`` is the cross-entropy at ``w``.

    Args:
        num_classes: number of classes ``K``.
        radius: distance of the worst weights, Euclidean over backbone, bottleneck and head: 0.02 in most of the
            paper's runs. With 0 the method is :class:`~framework.modules.adaptation.AlignmentSum`.
        terms: weight of each loss by its name; CDAN by default.
        options: those of :class:`~framework.modules.adaptation.AlignmentSum`.
    """

    def __init__(
        self, num_classes: int, *, radius: float = 0.02, terms: dict[str, float] | None = None, **options: Any
    ) -> None:
        super().__init__(num_classes, terms={"cdan": 1.0} if terms is None else terms, **options)
        at_least_zero("--model.radius", radius)
        self.radius = radius
        self._at_home: dict[Tensor, Tensor] = {}

    def training_step(self, batch: DomainBatch, batch_idx: int) -> Tensor | None:
        """The loss at the worst weights nearby, where the network stays until :meth:`backward`."""
        if not self.radius:
            return super().training_step(batch, batch_idx)
        self._climb(self._task_loss(batch))
        try:
            self.reseed(self.global_rank)  # as in the pass before
            with running_statistics_kept(self._network()):
                return super().training_step(batch, batch_idx)
        except BaseException:
            self._return()
            raise

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        """The gradient, and the network back at its weights."""
        try:
            super().backward(loss, *args, **options)
        finally:
            self._return()

    def _network(self) -> nn.Module:
        return nn.ModuleList([self.backbone, self.bottleneck, self.head])

    def _task_loss(self, batch: DomainBatch) -> Tensor:
        source, target = self.domain_outputs(batch.source.images, batch.target)
        loss = self.classification_loss(source.logits, batch.source.labels)
        self._means.add({"train/classification_loss_before": loss.detach()})
        losses = {name: each for name, each in self.alignment.losses.items() if each.is_task}  # type: ignore[union-attr, operator]
        if losses:
            smoothed = WeightedAlignmentSum(losses, self.alignment.weights)  # type: ignore[arg-type]
            loss = loss + self.trade_off * smoothed(*self.to_align(source, target, batch), self.progress)
        return loss

    def _climb(self, loss: Tensor) -> None:
        """Move the network ``radius`` up the gradient of ``loss``, the mean of all processes'."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # 16-mixed, where small gradients would be lost; their length plays no part
            loss = scaler.scale(loss)
        parameters: list[Tensor] = [parameter for parameter in self._network().parameters() if parameter.requires_grad]
        found = zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)
        slopes = {parameter: gradient for parameter, gradient in found if gradient is not None}
        parameters, gradients = list(slopes), self._mean_of_all_processes(list(slopes.values()))
        self._at_home = {parameter: parameter.detach().clone() for parameter in parameters}
        factor = self.radius / (torch.nn.utils.get_total_norm(gradients) + 1e-12)
        with torch.no_grad():
            torch._foreach_mul_(gradients, factor)
            torch._foreach_add_(parameters, gradients)
        torch.clear_autocast_cache()  # autocast keeps copies of the weights in half precision

    def _mean_of_all_processes(self, gradients: list[Tensor]) -> list[Tensor]:
        if self.trainer.world_size == 1:
            return gradients
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        flat = self.trainer.strategy.reduce(flat, reduce_op="mean")
        parts = flat.split([gradient.numel() for gradient in gradients])
        return [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]

    @torch.no_grad()
    def _return(self) -> None:
        for parameter, value in self._at_home.items():
            parameter.copy_(value)
        self._at_home = {}

    def complaints(self, means: dict[str, float], progress: float) -> Iterator[tuple[str, str]]:
        """A radius at which the classifier no longer works."""
        yield from super().complaints(means, progress)
        added = means.get("train/classification_loss", 0.0) - means.get("train/classification_loss_before", 0.0)
        if progress >= 0.1 and added > 1:
            yield (
                "radius",
                f"the weights at `--model.radius` {self.radius} add {added:.1f} nats to the classification loss "
                "(`train/classification_loss` above `train/classification_loss_before`), so that a step says little "
                "about the weights themselves. Lower it.",
            )
