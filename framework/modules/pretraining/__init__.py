"""Self-supervised pre-training: one task, one file."""

from framework.modules.pretraining.base import PretextTask, PretrainingModule
from framework.modules.pretraining.rotation_prediction import RotationPrediction

__all__ = ["PretextTask", "PretrainingModule", "RotationPrediction"]
