"""Formulas: tensors in, tensors out. No parameters, no state, no Lightning."""

from __future__ import annotations

from framework.functional.central_moments import central_moment_discrepancies
from framework.functional.classifier_discrepancy import class_balance, classifier_discrepancy
from framework.functional.confusion import class_confusion
from framework.functional.contrast import queue_contrast, unit_length
from framework.functional.correlation_alignment import coral
from framework.functional.distillation import distillation_loss
from framework.functional.entropy import marginal_entropy, prediction_entropy
from framework.functional.feature_distance import channel_distances
from framework.functional.gradient_reversal import reverse_gradient
from framework.functional.jigsaw import (
    assemble,
    crop_pieces,
    cut_pieces,
    maximal_hamming_permutations,
    permute_pieces,
)
from framework.functional.kernels import FIVE_SCALES, gaussian_kernel_sum, mean_squared_distance, squared_distances
from framework.functional.masking import mask_of_pixels, masked_reconstruction_loss, random_block_mask
from framework.functional.mmd import MMDEstimator, biased_mmd, joint_mmd, linear_time_mmd, unbiased_mmd
from framework.functional.multilinear import multilinear_map, randomized_multilinear_map
from framework.functional.nt_xent import nt_xent
from framework.functional.optimal_transport import check_transport_package, exact_coupling, sinkhorn_coupling
from framework.functional.precision import full_precision, full_precision_gram, full_precision_matmul
from framework.functional.probes import linear_probe, nearest_neighbour_scores
from framework.functional.rotation import quarter_turns
from framework.functional.schedules import cosine_with_warmup, inverse_decay, reversal_coefficient, step_decay
from framework.functional.sliced_wasserstein import random_directions, sliced_wasserstein
from framework.functional.spectral import (
    largest_squared_singular_values,
    nuclear_norm,
    smallest_squared_singular_values,
)
from framework.functional.subdomain_mmd import CountedClasses, local_mmd
from framework.functional.task_relationship import (
    direct_relationship,
    reverse_relationship,
    soft_cross_entropy,
    source_probabilities,
)
from framework.functional.transferability import (
    h_score,
    leep,
    log_maximum_evidence,
    negative_conditional_entropy,
)
from framework.functional.vicreg import vicreg_terms
from framework.functional.weight_distance import half_squared_distance

__all__ = [
    "FIVE_SCALES",
    "CountedClasses",
    "MMDEstimator",
    "assemble",
    "biased_mmd",
    "central_moment_discrepancies",
    "channel_distances",
    "check_transport_package",
    "class_balance",
    "class_confusion",
    "classifier_discrepancy",
    "coral",
    "cosine_with_warmup",
    "crop_pieces",
    "cut_pieces",
    "direct_relationship",
    "distillation_loss",
    "exact_coupling",
    "full_precision",
    "full_precision_gram",
    "full_precision_matmul",
    "gaussian_kernel_sum",
    "h_score",
    "half_squared_distance",
    "inverse_decay",
    "joint_mmd",
    "largest_squared_singular_values",
    "leep",
    "linear_probe",
    "linear_time_mmd",
    "local_mmd",
    "log_maximum_evidence",
    "marginal_entropy",
    "mask_of_pixels",
    "masked_reconstruction_loss",
    "maximal_hamming_permutations",
    "mean_squared_distance",
    "multilinear_map",
    "nearest_neighbour_scores",
    "negative_conditional_entropy",
    "nt_xent",
    "nuclear_norm",
    "permute_pieces",
    "prediction_entropy",
    "quarter_turns",
    "queue_contrast",
    "random_block_mask",
    "random_directions",
    "randomized_multilinear_map",
    "reversal_coefficient",
    "reverse_gradient",
    "reverse_relationship",
    "sinkhorn_coupling",
    "sliced_wasserstein",
    "smallest_squared_singular_values",
    "soft_cross_entropy",
    "source_probabilities",
    "squared_distances",
    "step_decay",
    "unbiased_mmd",
    "unit_length",
    "vicreg_terms",
]
