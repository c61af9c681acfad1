"""LightningModules: what the Trainer fits."""

from framework.modules import adaptation, pretraining, transfer
from framework.modules.adaptation import *  # noqa: F403  (a new method is one import line, there)
from framework.modules.base import ImageClassifier
from framework.modules.ensemble import PredictionEnsemble
from framework.modules.pretraining import *  # noqa: F403
from framework.modules.residual import ResidualClassifier
from framework.modules.transfer import *  # noqa: F403

__all__ = [
    *adaptation.__all__,
    *pretraining.__all__,
    *transfer.__all__,
    "ImageClassifier",
    "PredictionEnsemble",
    "ResidualClassifier",
]
