"""Callbacks that every run has by default."""

from framework.callbacks.confusion_matrix import ConfusionMatrix
from framework.callbacks.final_metrics import FinalMetrics
from framework.callbacks.prediction_writer import PredictionWriter
from framework.callbacks.sample_images import SampleImages

__all__ = ["ConfusionMatrix", "FinalMetrics", "PredictionWriter", "SampleImages"]
