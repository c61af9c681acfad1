"""Callbacks that every run has by default, and two that one asks for: the average of the weights, the online probe."""

from framework.callbacks.confusion_matrix import ConfusionMatrix
from framework.callbacks.exponential_moving_average import ExponentialMovingAverage
from framework.callbacks.final_metrics import FinalMetrics
from framework.callbacks.online_probe import OnlineProbe
from framework.callbacks.prediction_writer import PredictionWriter
from framework.callbacks.pretext_images import PretextImages
from framework.callbacks.progress_bar import UnhurriedProgressBar
from framework.callbacks.sample_images import SampleImages

__all__ = [
    "ConfusionMatrix",
    "ExponentialMovingAverage",
    "FinalMetrics",
    "OnlineProbe",
    "PredictionWriter",
    "PretextImages",
    "SampleImages",
    "UnhurriedProgressBar",
]
