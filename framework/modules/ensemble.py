"""Several classifiers that answer as one: the mean of their predictions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from framework.batch import LabelledBatch, PredictionBatch, Predictions
from framework.errors import ConfigurationError
from framework.functional.mixture import mixture_log_probabilities
from framework.metrics import test_metrics
from framework.modules.base import ImageClassifier
from framework.modules.members import Checkpoint, Member, check_names, members_of

Average = Literal["probabilities", "logits"]
FLAG = "--model.members"


class PredictionEnsemble(L.LightningModule):
    """The mean prediction of trained classifiers of the same classes, for test and prediction; it does not train.

    Members may be of any class of the framework, with backbones of their own. Where they were trained on images
    normalised otherwise, they get them so. A checkpoint of the ensemble holds all of them, and needs their files no
    more; ``experiments/fuse.py ensemble`` writes one.

    Args:
        num_classes: number of classes ``K``.
        members: checkpoint files; None where a checkpoint of the ensemble is loaded, which holds them.
        average: of ``probabilities``, or of ``logits``, which is the normalised geometric mean of the probabilities:
            one member that is sure against a class then counts for more.
        resize_for_members: bring images to the size that each member was trained on, where that is another one.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/accuracy", "max")
    batch_type: ClassVar[type] = LabelledBatch

    def __init__(
        self,
        num_classes: int,
        *,
        members: list[str] | None = None,
        average: Average = "probabilities",
        resize_for_members: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if average not in get_args(Average):
            raise ConfigurationError(
                f"Expected `--model.average` to be 'probabilities' or 'logits', but got {average!r}."
            )
        if members is not None and not members:
            raise ConfigurationError(f"Expected `{FLAG}` to name checkpoint files, but got none.")
        self.num_classes, self.average, self.resize_for_members = num_classes, average, resize_for_members
        self.members = nn.ModuleList(members_of(members or [], FLAG, num_classes, resize_for_members))
        self._know()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_metrics = test_metrics(num_classes)
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    def _know(self) -> None:
        """What the data asks of every module: the classes, and what the images should be like."""
        members = self._each()
        self.class_names = next((member.class_names for member in members if member.class_names is not None), None)
        self.preprocessing = next((member.trained_on for member in members if member.trained_on is not None), None)

    def _each(self) -> list[Member]:
        return [member for member in self.members if isinstance(member, Member)]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, K]`` of images ``[N, 3, H, W]``: those whose softmax is the mean prediction."""
        logits = torch.stack([member(images).float() for member in self.members])
        return logits.mean(dim=0) if self.average == "logits" else mixture_log_probabilities(logits)

    # ------------------------------------------------------------------ evaluation, as every classifier's
    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Accuracy and loss of labelled images."""
        ImageClassifier.validation_step(self, batch, batch_idx)  # type: ignore[arg-type]

    def test_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Accuracy, mean class accuracy, macro-F1, calibration and confusion matrix of labelled images."""
        ImageClassifier.test_step(self, batch, batch_idx)  # type: ignore[arg-type]

    def predict_step(self, batch: PredictionBatch, batch_idx: int) -> Predictions:
        """Predicted classes and probabilities, with the paths of the images."""
        return ImageClassifier.predict_step(self, batch, batch_idx)  # type: ignore[arg-type]

    def on_test_start(self) -> None:
        """Count anew, and learn what the images are like."""
        ImageClassifier.on_test_start(self)  # type: ignore[arg-type]
        self._prepare()

    def on_validation_start(self) -> None:
        """Learn what the images are like."""
        self._prepare()

    on_predict_start = on_validation_start

    def _prepare(self) -> None:
        if not self.members:
            raise ConfigurationError(f"Expected `{FLAG}` or a checkpoint of an ensemble, but got neither.")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        # a folder of images to predict may have no classes at all
        names = None if self.trainer.predicting else getattr(data, "class_names", None)
        for member in self._each():
            check_names(names, member, FLAG, "the data")
            member.prepare(data, "--model.resize_for_members")

    # ------------------------------------------------------------------ training, which there is none of
    def prepare_data(self) -> None:
        """Refuse ``fit`` before anything is written."""
        if self.trainer.state.fn == "fit":
            raise ConfigurationError(
                "Expected a model that trains, but PredictionEnsemble is made of trained ones: `test` and `predict` it."
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """There is none."""
        raise TypeError("PredictionEnsemble does not train")

    def configure_optimizers(self) -> None:
        """There are none."""

    # ------------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Say what the members are, in plain values: with their weights, which the state dict has, all that is
        needed to build them again."""
        hyperparameters = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        hyperparameters["members"] = None
        hyperparameters["_class_path"] = f"{type(self).__module__}.{type(self).__qualname__}"
        hyperparameters["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
        checkpoint["members"] = [member.record for member in self._each()]
        if self.class_names is not None:
            checkpoint["class_names"] = self.class_names
        if self.preprocessing is not None:
            checkpoint["preprocessing"] = self.preprocessing.plain()

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Build the members that the checkpoint holds."""
        self.members = nn.ModuleList(
            Member.restore(record, checkpoint["state_dict"], f"members.{index}.", self.resize_for_members)
            for index, record in enumerate(checkpoint["members"])
        ).to(self.device)
        self._know()
