"""StochNorm: batch norms that take turns between the batch's statistics and the running ones.

Kou, You, Long and Wang, "Stochastic Normalization", NeurIPS 2020.
"""

from __future__ import annotations

from typing import Any

from framework.errors import ConfigurationError
from framework.modules.transfer.base import TransferClassifier
from framework.networks import StochasticNorm, convert_stochastic


class StochNorm(TransferClassifier):
    """StochNorm (Kou et al., NeurIPS 2020): fine-tuning with a stochastic norm for every batch norm of the backbone.

    In training each channel is normalised by the running statistics, which start as the pretrained ones, with
    ``probability`` and by the batch's otherwise, drawn anew in each forward pass; see
    :class:`~framework.networks.StochasticNorm`. In evaluation nothing differs from batch norm, and the checkpoint's
    backbone is that of the plain one. There is no further term, and the bottleneck keeps its batch norm.

    Args:
        num_classes: number of classes ``K``.
        probability: of the running statistics, for each channel; 0.5 in the paper. In the paper's code and TLlib ``p``
            is the probability of the batch's. TLlib's converter hands it to another argument: its ``p`` stays 0.5.
        options: those of :class:`~framework.modules.transfer.TransferClassifier`.

    Raises:
        ConfigurationError: a backbone without batch norms, or a policy under which they never train.
    """

    def __init__(self, num_classes: int, *, probability: float = 0.5, **options: Any) -> None:
        super().__init__(num_classes, **options)
        for option, expected in (("policy", "full"), ("batch_norm", "train")):
            given = options.get(option, expected)
            if given in ("frozen", "lora", "source_statistics"):
                raise ConfigurationError(
                    f"Expected `--model.{option}` under which the backbone's batch norms are trained, which StochNorm "
                    f"does in another way, but got {given!r}. Try {expected!r}."
                )
        convert_stochastic(self.backbone, probability)
        if not self._has_stochastic_norms():
            raise ConfigurationError(
                "Expected a `--model.backbone` with batch norms, which StochNorm trains in another way, but got "
                f"{self.hparams['backbone']!r}, which has none."
            )

    def on_fit_start(self) -> None:
        """Refuse a run in which the stochastic norms have been replaced."""
        super().on_fit_start()
        if not self._has_stochastic_norms():
            raise ConfigurationError(
                "Expected `--trainer.sync_batchnorm false` with StochNorm, but got true, which has replaced the "
                "stochastic norms by batch norms."
            )

    def _has_stochastic_norms(self) -> bool:
        return any(isinstance(part, StochasticNorm) for part in self.backbone.modules())
