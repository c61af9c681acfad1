"""Distillation: a student learns from the labels and from the predictions of trained teachers.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.batch import LabelledBatch
from framework.errors import ConfigurationError
from framework.functional import distillation_loss
from framework.functional.mixture import mixture_log_probabilities
from framework.modules.members import Checkpoint, Member, check_names, members_of, read_checkpoint
from framework.modules.transfer.base import TransferClassifier

FLAG = "--model.teachers"


class Distillation(TransferClassifier):
    """Cross-entropy on the labels and divergence from the teachers' softened predictions (Hinton 2015).

    ``(1 - trade_off) * cross-entropy + trade_off * T^2 KL(teacher || student)``, both predictions softened by the
    temperature ``T``. Several teachers count by the mean of their softened probabilities. Teachers are any trained
    classifiers of the framework with the same classes, an ensemble too; they see the batch that the student sees, in
    evaluation mode and normalised as they are used to. They are part of the checkpoint: a run that is resumed and a
    student that is loaded need the teachers' files no more.

    Logs ``train/classification_loss``, ``train/distillation_loss``, ``train/teacher_agreement``, the share of images
    that student and teachers put into one class, and ``train/teacher_accuracy`` on the batch.

    Args:
        num_classes: number of classes ``K``.
        teachers: checkpoint files of the teachers.
        trade_off: share of the teachers in the loss, in [0, 1].
        temperature: ``T``, above 0.
        teacher_weights: one for each teacher, in their mean; default: all alike.
        resize_for_teachers: bring images to the size that each teacher was trained on, where that is another one.
        options: those of :class:`~framework.modules.transfer.TransferClassifier`, which are the student's.
    """

    shares: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        teachers: list[str] | None = None,
        trade_off: float = 0.9,
        temperature: float = 4.0,
        teacher_weights: list[float] | None = None,
        resize_for_teachers: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        if not 0 <= trade_off <= 1:
            raise ConfigurationError(f"Expected `--model.trade_off` to be from 0 to 1, but got {trade_off}.")
        if not temperature > 0:
            raise ConfigurationError(f"Expected `--model.temperature` to be above 0, but got {temperature}.")
        if teachers is not None and teacher_weights is not None:
            _check_weights(teacher_weights, len(teachers))
        self.trade_off, self.temperature, self.resize_for_teachers = trade_off, temperature, resize_for_teachers
        self.teachers = nn.ModuleList()
        self.register_buffer("shares", torch.empty(0), persistent=False)
        self._files, self._weights = list(teachers or []), teacher_weights
        # where files are gone, a checkpoint that holds the teachers must come, or training ends before it begins
        if all(Path(file).is_file() for file in self._files):
            self._teach(members_of(self._files, FLAG, num_classes, resize_for_teachers))

    def _teach(self, teachers: list[Member]) -> None:
        weights = self._weights or [1.0] * len(teachers)
        self.teachers = nn.ModuleList(teachers).to(self.device)
        self.shares = torch.tensor(weights, device=self.device)

    def _each(self) -> list[Member]:
        return [teacher for teacher in self.teachers if isinstance(teacher, Member)]

    # ------------------------------------------------------------------ before training
    def prepare_data(self) -> None:
        """Refuse teachers of other classes than the data's, or of images of another size."""
        super().prepare_data()
        if self.trainer.state.fn == "fit":
            self._meet(self.trainer.datamodule)  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        """Let the teachers know what the images are like; those of a resumed run are there only now.

        Raises:
            ConfigurationError: no teachers, neither from files nor from a checkpoint.
        """
        super().on_fit_start()
        if not self.teachers:
            for file in self._files:
                read_checkpoint(file, FLAG)  # says which one is not there
            raise ConfigurationError(f"Expected `{FLAG}` to name checkpoint files, but got none.")
        self._meet(self.trainer.datamodule)  # type: ignore[attr-defined]

    def _meet(self, data: Any) -> None:
        for teacher in self._each():
            check_names(getattr(data, "class_names", None), teacher, FLAG, "the data")
            teacher.prepare(data, "--model.resize_for_teachers")

    # ------------------------------------------------------------------ training
    def teacher_logits(self, images: Tensor) -> Tensor:
        """What the student should say of images ``[N, 3, H, W]``: logits ``[N, K]`` whose softmax at the temperature is
        the mean of the teachers' softened probabilities."""
        logits = torch.stack([teacher(images) for teacher in self.teachers])
        if len(logits) == 1:
            return logits[0]
        return self.temperature * mixture_log_probabilities(logits.float() / self.temperature, self.shares)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor | None:
        """The weighted sum of both losses."""
        teacher, student = self.teacher_logits(batch.images), self(batch.images)
        classification = self.classification_loss(student, batch.labels)
        distillation = distillation_loss(student, teacher, self.temperature)
        answers = teacher.argmax(dim=1)
        return self.logged_loss(
            (1 - self.trade_off) * classification + self.trade_off * distillation,
            classification_loss=classification,
            distillation_loss=distillation,
            teacher_agreement=(student.argmax(dim=1) == answers).float().mean(),
            teacher_accuracy=(answers == batch.labels).float().mean(),
        )

    # ------------------------------------------------------------------ checkpoints
    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Say what the teachers are, in plain values; their weights are in the state dict."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["teachers"] = None
        checkpoint["teachers"] = [teacher.record for teacher in self._each()]

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take the checkpoint's teachers, whatever the files hold by now."""
        super().on_load_checkpoint(checkpoint)
        self._teach(
            [
                Member.restore(record, checkpoint["state_dict"], f"teachers.{index}.", self.resize_for_teachers)
                for index, record in enumerate(checkpoint["teachers"])
            ]
        )


def _check_weights(weights: list[float], teachers: int) -> None:
    if len(weights) != teachers or min(weights) < 0 or sum(weights) <= 0:
        raise ConfigurationError(
            f"Expected `--model.teacher_weights` to be {teachers} numbers, one for each teacher, 0 or more and not all "
            f"0, but got {weights}."
        )
