"""Callbacks that every run has by default, and the average of the weights, which one asks for."""

from framework.callbacks.confusion_matrix import ConfusionMatrix
from framework.callbacks.exponential_moving_average import ExponentialMovingAverage
from framework.callbacks.final_metrics import FinalMetrics
from framework.callbacks.prediction_writer import PredictionWriter
from framework.callbacks.sample_images import SampleImages

__all__ = ["ConfusionMatrix", "ExponentialMovingAverage", "FinalMetrics", "PredictionWriter", "SampleImages"]
