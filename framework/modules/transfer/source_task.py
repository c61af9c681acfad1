"""The source task's classifier beside the new one: what the methods that keep it share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.modules.transfer.regularized import RegularizedTransfer
from framework.networks import NetworkOutputs


class SourceTaskTransfer(RegularizedTransfer):
    """Base of the methods that keep the classifier that the backbone was pretrained with: ``self.source_head``.

    It is a linear layer on the backbone's output, below a bottleneck, and learns at the backbone's rate. It takes no
    part in predictions. It comes with the backbone, as ``backbone.source_classifier``: whatever provides weights
    (``--model.weights``, ``--model.init_from``) says there what the classifier was.

    Args:
        num_classes: number of classes ``K``.
        source_classes: number of source classes ``S``; default: those of the weights. A checkpoint says it for itself.
        options: those of :class:`~framework.modules.transfer.RegularizedTransfer`.

    Raises:
        ConfigurationError: the weights come without a classifier, or with one of another number of classes.
    """

    source_head_loaded: Tensor

    def __init__(self, num_classes: int, *, source_classes: int | None = None, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.source_head, loaded = self._build_source_head(source_classes)
        self.source_classes = self.source_head.out_features
        # in the state dict: a checkpoint's source head was loaded once, though its weights are not read again
        self.register_buffer("source_head_loaded", torch.tensor(loaded))
        self._backbone_features: Tensor | None = None

    def _build_source_head(self, source_classes: int | None) -> tuple[nn.Linear, bool]:
        features = int(self.backbone.num_features)  # type: ignore[arg-type]
        classifier = getattr(self.backbone, "source_classifier", None)
        if classifier is None:
            if source_classes is None:
                raise ConfigurationError(
                    "Expected `--model.weights` with the classifier of the source task, which "
                    f"{type(self).__name__} keeps, but got {self.hparams.get('weights')!r} without a linear one for "
                    f"{self.hparams.get('backbone')!r}. Give published weights, or a file whose state dict still has "
                    "its classifier."
                )
            return nn.Linear(features, source_classes), False
        weight, bias = classifier["weight"], classifier.get("bias")
        if source_classes not in (None, len(weight)):
            raise ConfigurationError(
                f"Expected `--model.source_classes` to be {len(weight)}, as in the weights, but got {source_classes}."
            )
        if weight.shape[1] != features:
            raise ConfigurationError(
                f"Expected the classifier in `--model.weights` to take the backbone's {features} features, but it "
                f"takes {weight.shape[1]}."
            )
        head = nn.Linear(features, len(weight))
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
        return head, True

    def on_fit_start(self) -> None:
        """Refuse a source head that nothing was loaded into; a checkpoint is restored by now."""
        super().on_fit_start()
        if not self.source_head_loaded:
            raise ConfigurationError(
                "Expected `--model.weights` with the classifier of the source task, but got "
                f"`--model.source_classes` {self.source_classes} alone, which starts one at random."
            )

    # ------------------------------------------------------------------ network
    def outputs(self, images: Tensor) -> NetworkOutputs:
        """Features ``[N, D]`` and logits ``[N, K]`` of images ``[N, 3, H, W]``; in training the backbone's are kept."""
        backbone_features = self.backbone(images)
        if self.training:
            self._backbone_features = backbone_features
        features = self.bottleneck(backbone_features)
        return NetworkOutputs(features, self.head(features))

    def source_logits(self) -> Tensor:
        """The source head's logits ``[N, S]`` of the batch that ``outputs`` was called with, once."""
        features, self._backbone_features = self._backbone_features, None  # the graph is the step's, not the module's
        assert features is not None
        logits: Tensor = self.source_head(features)
        return logits

    # ------------------------------------------------------------------ optimisation
    def learning_rate_factor(self, part: str) -> float:
        """The source head is pretrained as the backbone is."""
        return super().learning_rate_factor("backbone" if part == "source_head" else part)

    # ------------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say the number of source classes, which the weights said."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["source_classes"] = self.source_classes
