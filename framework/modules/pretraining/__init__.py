"""Self-supervised pre-training: one task, one file."""

from framework.modules.pretraining.base import PretextTask, PretrainingModule
from framework.modules.pretraining.jigsaw_prediction import JigsawPrediction
from framework.modules.pretraining.masked_image_reconstruction import MaskedImageReconstruction
from framework.modules.pretraining.rotation_prediction import RotationPrediction
from framework.modules.pretraining.simclr import SimCLR
from framework.modules.pretraining.vicreg import VICReg

__all__ = [
    "JigsawPrediction",
    "MaskedImageReconstruction",
    "PretextTask",
    "PretrainingModule",
    "RotationPrediction",
    "SimCLR",
    "VICReg",
]
