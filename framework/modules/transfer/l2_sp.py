"""L2-SP: weights that are pulled back to where fine-tuning started, not to zero.

Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018,
arXiv:1802.01483.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from framework.batch import LabelledBatch
from framework.functional import half_squared_distance
from framework.modules.transfer.regularized import RegularizedTransfer
from framework.networks import NetworkOutputs


class StartingPoint(nn.Module):
    """The parameters of a network as they are now, by their names with ``/`` for the dots; in the ``state_dict``.

    Args:
        network: whose parameters are copied. Buffers, such as batch-norm statistics, are no weights.
        vectors: also those with fewer than two dimensions: biases, scales and shifts.
    """

    def __init__(self, network: nn.Module, vectors: bool = True) -> None:
        super().__init__()
        for name, parameter in network.named_parameters():
            if vectors or parameter.dim() > 1:
                self.register_buffer(name.replace(".", "/"), parameter.detach().clone())

    def half_squared_distance(self, network: nn.Module) -> Tensor:
        """``1/2 |w - w0|^2`` of the network that was copied, a scalar."""
        anchors = {name.replace("/", "."): anchor for name, anchor in self.named_buffers()}
        weights = dict(network.named_parameters())
        return half_squared_distance([weights[name] for name in anchors], list(anchors.values()))


class L2SP(RegularizedTransfer):
    """L2-SP (Li et al., ICML 2018): ``cross-entropy + alpha / 2 |w - w0|^2 + beta / 2 |v|^2``.

    ``w`` are the backbone's weights, ``w0`` what they were before training and ``v`` those of bottleneck and head,
    which have no such past; ``alpha`` is ``trade_off`` and ``beta`` is ``head_decay``. The term takes the place of the
    optimizer's weight decay, whose default is 0 here: that pulls the same weights to zero.

    The starting point is in the checkpoint, which is larger by the backbone's parameters. Diagnostics: ``distance``,
    ``|w - w0|``, and ``head_regularization``, ``1/2 |v|^2``.

    Args:
        num_classes: number of classes ``K``.
        trade_off: ``alpha``; 0.1 in the authors' command, 0.01 in TLlib.
        head_decay: ``beta``; 0.01 in both.
        vectors: count biases and the norms' scales and shifts too, of both parts, as the formula and TLlib do; the
            authors' command takes the weights of linear layers and convolutions alone.
        weight_decay: of the optimizer, on top of the two terms.
        options: those of :class:`~framework.modules.transfer.TransferClassifier`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        trade_off: float = 0.1,
        head_decay: float = 0.01,
        vectors: bool = True,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        decays = {"head_decay": head_decay, "weight_decay": weight_decay}
        super().__init__(num_classes, trade_off=trade_off, **decays, **options)
        self.vectors = vectors
        self.starting_point = StartingPoint(self.backbone, vectors)

    def regularization(self, outputs: NetworkOutputs, batch: LabelledBatch) -> Tensor:
        """``1/2 |w - w0|^2``; the batch plays no part."""
        half = self.starting_point.half_squared_distance(self.backbone)
        self.diagnostics = {"distance": (2 * half.detach()).sqrt()}
        return half

    def new_weights(self) -> list[nn.Parameter]:
        """What ``head_decay`` pulls to zero."""
        return [weight for weight in super().new_weights() if self.vectors or weight.dim() > 1]
