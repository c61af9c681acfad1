"""Formulas: tensors in, tensors out. No parameters, no state, no Lightning."""

from __future__ import annotations

from framework.functional.central_moments import central_moment_discrepancies
from framework.functional.classifier_discrepancy import class_balance, classifier_discrepancy
from framework.functional.confusion import class_confusion
from framework.functional.correlation_alignment import coral
from framework.functional.entropy import marginal_entropy, prediction_entropy
from framework.functional.gradient_reversal import reverse_gradient
from framework.functional.kernels import FIVE_SCALES, gaussian_kernel_sum, mean_squared_distance, squared_distances
from framework.functional.mmd import MMDEstimator, biased_mmd, joint_mmd, linear_time_mmd, unbiased_mmd
from framework.functional.multilinear import multilinear_map, randomized_multilinear_map
from framework.functional.optimal_transport import check_transport_package, exact_coupling, sinkhorn_coupling
from framework.functional.precision import full_precision, full_precision_matmul
from framework.functional.schedules import cosine_with_warmup, inverse_decay, reversal_coefficient, step_decay
from framework.functional.sliced_wasserstein import random_directions, sliced_wasserstein
from framework.functional.spectral import largest_squared_singular_values, nuclear_norm
from framework.functional.subdomain_mmd import CountedClasses, local_mmd

__all__ = [
    "FIVE_SCALES",
    "CountedClasses",
    "MMDEstimator",
    "biased_mmd",
    "central_moment_discrepancies",
    "check_transport_package",
    "class_balance",
    "class_confusion",
    "classifier_discrepancy",
    "coral",
    "cosine_with_warmup",
    "exact_coupling",
    "full_precision",
    "full_precision_matmul",
    "gaussian_kernel_sum",
    "inverse_decay",
    "joint_mmd",
    "largest_squared_singular_values",
    "linear_time_mmd",
    "local_mmd",
    "marginal_entropy",
    "mean_squared_distance",
    "multilinear_map",
    "nuclear_norm",
    "prediction_entropy",
    "random_directions",
    "randomized_multilinear_map",
    "reversal_coefficient",
    "reverse_gradient",
    "sinkhorn_coupling",
    "sliced_wasserstein",
    "squared_distances",
    "step_decay",
    "unbiased_mmd",
]
