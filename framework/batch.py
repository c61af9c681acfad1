"""The batches, and what a prediction returns of one: all that modules and datamodules share."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from torch import Tensor


class LabelledBatch(NamedTuple):
    """Images with labels: what classifiers train on and every test reads.

    Attributes:
        images: shape ``[N, 3, H, W]``, with several views of each ``[N, views, 3, H, W]``; uint8 on the way, normalised
            floats once on the device.
        labels: class indices, shape ``[N]``.
        domains: which of several source folders each image is from, shape ``[N]``; 0 where that is not said, as in a
            dataset of the user's own.
    """

    images: Tensor
    labels: Tensor
    domains: Tensor | int = 0


class UnlabelledBatch(NamedTuple):
    """Images alone, of one folder or of several: what self-supervised pre-training sees. It has no room for a label.

    Attributes:
        images: shape ``[N, 3, H, W]``, or ``[N, views, 3, H, W]`` with several views of each image. Of ``S`` folders,
            image ``i`` is of folder ``i % S``.
    """

    images: Tensor


class DomainBatch(NamedTuple):
    """One step of domain adaptation. The target has no labels here, so they cannot reach training.

    Attributes:
        source: labelled images, ``[N, 3, H, W]`` and ``[N]``.
        target: unlabelled images, ``[M, 3, H, W]``, with several views of each ``[M, views, 3, H, W]``.
    """

    source: LabelledBatch
    target: Tensor


class PredictionBatch(NamedTuple):
    """Images to predict and where they came from.

    Attributes:
        images: shape ``[N, 3, H, W]``.
        paths: one path an image.
    """

    images: Tensor
    paths: list[str]


class Predictions(TypedDict):
    """What ``predict_step`` returns for a batch.

    Keys:
        paths: one path an image.
        classes: predicted class indices, ``[N]``.
        probabilities: ``[N, K]``.
    """

    paths: list[str]
    classes: Tensor
    probabilities: Tensor
