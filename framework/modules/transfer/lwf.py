"""Learning without forgetting: on the new images, the source task's predictions stay what they were.

Li and Hoiem, "Learning without Forgetting", ECCV 2016, arXiv:1606.09282.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.functional import distillation_loss
from framework.modules.transfer.source_task import SourceTaskTransfer
from framework.networks import FrozenCopy, NetworkOutputs


class LWF(SourceTaskTransfer):
    """Cross-entropy plus distillation of the original network's source predictions (Li and Hoiem 2016).

    The original network, backbone and source classifier as the weights had them, looks at each training image in
    evaluation mode; its softened predictions are the targets of the learning backbone with the learning source head.
    The paper's modified cross-entropy differs from the divergence here by the targets' entropy, which has no gradient.

    The paper first trains the new head alone until it converges (``--model.policy lp_ft`` does so). TLlib records the
    original's predictions once for each image; here they are those of each view that augmentation makes.

    Args:
        num_classes: number of classes ``K``.
        trade_off: weight of the distillation: 1 in the paper, 4 in TLlib.
        temperature: of both softmax: 2 in the paper, 3 in TLlib.
        squared_temperature: multiply the distillation by the square of the temperature; neither of the two does.
        options: those of :class:`~framework.modules.transfer.source_task.SourceTaskTransfer`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        trade_off: float = 1.0,
        temperature: float = 2.0,
        squared_temperature: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, trade_off=trade_off, **options)
        if temperature <= 0:
            raise ConfigurationError(f"Expected `--model.temperature` to be above 0, but got {temperature}.")
        self.temperature, self.squared_temperature = temperature, squared_temperature
        self.original = FrozenCopy(nn.Sequential(self.backbone, self.source_head))

    def configure_model(self) -> None:
        """Compile the original too."""
        super().configure_model()
        if self.compile_networks and not getattr(self.original.module, "_compiled_call_impl", None):
            self.original.module.compile()

    def regularization(self, outputs: NetworkOutputs, batch: LabelledBatch) -> Tensor:
        """The distillation loss of a batch, a scalar."""
        return distillation_loss(
            self.source_logits(),
            self.original(batch.images),
            self.temperature,
            squared_temperature=self.squared_temperature,
        )
