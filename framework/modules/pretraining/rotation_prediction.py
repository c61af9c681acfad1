"""Rotation prediction: which way up is an image?

Gidaris, Singh & Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018,
arXiv:1803.07728.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.functional import quarter_turns
from framework.modules.pretraining.base import Encoder, PretextTask, PretrainingModule, Preview

Rotations = Literal["all", "random"]


class RotationTask(PretextTask):
    """Cross-entropy of a linear head that tells by how many quarter turns an image was rotated.

    Diagnostics: ``rotation_accuracy``, 0.25 by guessing.

    Args:
        num_features: width ``C`` of the backbone's features.
        rotations: ``all``, each image in all four rotations in one batch, as the paper has it, or ``random``, one
            rotation an image, drawn anew each time: a quarter of the cost.
    """

    changes_images: ClassVar[bool] = True

    def __init__(self, num_features: int, rotations: Rotations = "all") -> None:
        super().__init__()
        if rotations not in get_args(Rotations):
            raise ConfigurationError(f"Expected `--model.rotations` to be 'all' or 'random', but got {rotations!r}.")
        self.rotations = rotations
        self.head = nn.Linear(num_features, 4)

    def forward(self, encode: Encoder, images: Tensor) -> Tensor:
        """Mean cross-entropy over the rotated images, a scalar."""
        rotated, turns = self._rotated(images)
        logits = self.head(encode(rotated))
        self.diagnostics = {"rotation_accuracy": (logits.detach().argmax(dim=1) == turns).float().mean()}
        return F.cross_entropy(logits, turns)

    def _rotated(self, images: Tensor) -> tuple[Tensor, Tensor]:
        turned, count = quarter_turns(images), len(images)
        if self.rotations == "all":
            return turned.flatten(0, 1), torch.arange(4, device=images.device).repeat_interleave(count)
        turns = torch.randint(4, (count,), device=images.device)
        return turned[turns, torch.arange(count, device=images.device)], turns

    def preview(self, encode: Encoder, images: Tensor) -> Preview:
        """Each image in its four rotations, with the predicted one."""
        turned = quarter_turns(images)
        predicted = self.head(encode(turned.flatten(0, 1))).argmax(dim=1).view(4, -1).T.tolist()
        captions = [[f"{90 * turns}°: {90 * guess}°" for turns, guess in enumerate(row)] for row in predicted]
        return Preview(turned.transpose(0, 1), captions)


class RotationPrediction(PretrainingModule):
    """Pre-training by predicting the rotation of an image (Gidaris et al., ICLR 2018).

    Of use where objects have a way up; blind to what a rotated object looks the same in (0 and 8, or a solar cell).

    Args:
        rotations: ``all`` four in one batch, as in the paper, or one at ``random`` for each image.
        options: those of :class:`~framework.modules.pretraining.PretrainingModule`.
    """

    def __init__(self, *, rotations: Rotations = "all", **options: Any) -> None:
        super().__init__(**options)
        self.task = RotationTask(self.num_features, rotations)
