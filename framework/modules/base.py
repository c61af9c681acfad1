"""What every classifier shares: bottleneck and head behind the backbone, cross-entropy, metrics, prediction."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from framework.batch import LabelledBatch, PredictionBatch, Predictions
from framework.errors import ConfigurationError, at_least_zero, in_range
from framework.metrics import test_metrics
from framework.modules.backbone_module import BackboneModule
from framework.networks import Bottleneck, NetworkOutputs


class ImageClassifier(BackboneModule):
    """Backbone, bottleneck and head, trained by cross-entropy on labelled images.

    Args:
        num_classes: number of classes ``K``; the command line takes it from the data.
        bottleneck_features: width ``D`` of the layer between backbone and head; 0 for none.
        bottleneck_normalization: ``batch`` or ``none``, after the bottleneck's linear layer.
        bottleneck_dropout: dropout probability after the bottleneck.
        label_smoothing: of the cross-entropy, in [0, 1).
        options: those of :class:`~framework.modules.backbone_module.BackboneModule`.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/accuracy", "max")
    batch_type: ClassVar[type] = LabelledBatch

    def __init__(
        self,
        num_classes: int,
        *,
        bottleneck_features: int = 0,
        bottleneck_normalization: Literal["batch", "none"] = "batch",
        bottleneck_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        if num_classes < 2:
            raise ConfigurationError(f"Expected `--model.num_classes` to be at least 2, but got {num_classes}.")
        in_range("--model.label_smoothing", label_smoothing, 0, 1)
        at_least_zero("--model.bottleneck_features", bottleneck_features)
        super().__init__(**options)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.bottleneck: nn.Module = nn.Identity()
        if bottleneck_features:
            self.bottleneck = Bottleneck(
                self.num_features, bottleneck_features, bottleneck_normalization, bottleneck_dropout
            )
            self.num_features = bottleneck_features
        self.bottleneck = self.started("bottleneck", self.bottleneck)
        self.head = self.started("head", nn.Linear(self.num_features, num_classes))
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_metrics = test_metrics(num_classes)
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    # ------------------------------------------------------------------ network
    def outputs(self, images: Tensor) -> NetworkOutputs:
        """Features ``[N, D]`` and logits ``[N, K]`` of images ``[N, 3, H, W]``."""
        features = self.bottleneck(self.backbone(images))
        return NetworkOutputs(features, self.head(features))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, K]`` of images ``[N, 3, H, W]``."""
        return self.outputs(images).logits

    def setup(self, stage: str) -> None:
        """Know the data's classes; a head that has learned others, though as many, begins anew."""
        if str(getattr(stage, "value", stage)) != "fit":
            return
        names = getattr(self.trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        self.class_names = None if names is None else [str(name) for name in names]
        if self._initialization is not None:  # before a checkpoint is restored, which then has the last word
            self._initialization.compare_classes(self.class_names, dict(self.named_children()))

    # ------------------------------------------------------------------ training
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Cross-entropy of a labelled batch."""
        return self.logged_loss(self.classification_loss(self(batch.images), batch.labels))

    def classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits ``[N, K]`` and class indices ``[N]`` or probabilities ``[N, K]``."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    # ------------------------------------------------------------------ evaluation
    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Accuracy and loss of labelled images."""
        logits = self(batch.images)
        self.val_accuracy.update(logits, batch.labels)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True, batch_size=len(logits))
        self.log("val/loss", F.cross_entropy(logits, batch.labels), sync_dist=True, batch_size=len(logits))

    def test_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Accuracy, mean class accuracy, macro-F1, calibration and confusion matrix of labelled images."""
        logits = self(batch.images).float()
        self.test_metrics.update(logits, batch.labels)
        self.test_confusion.update(logits, batch.labels)
        self.log_dict(self.test_metrics, batch_size=len(logits))

    def on_test_start(self) -> None:
        """Count anew: the confusion matrix is not logged, so Lightning does not reset it."""
        self.test_confusion.reset()

    def predict_step(self, batch: PredictionBatch, batch_idx: int) -> Predictions:
        """Predicted classes and probabilities, with the paths of the images."""
        probabilities = self(batch.images).float().softmax(dim=1)
        return Predictions(paths=list(batch.paths), classes=probabilities.argmax(dim=1), probabilities=probabilities)
