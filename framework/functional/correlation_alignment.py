"""The distance of two covariance matrices."""

from __future__ import annotations

from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.kernels import check_features
from framework.functional.precision import full_precision, full_precision_gram, full_precision_matmul


@full_precision
def coral(source: Tensor, target: Tensor, mean_weight: float = 0.0) -> Tensor:
    """``|C_s - C_t|_F^2 / (4 d^2)`` with unbiased covariances (Sun & Saenko 2016, eq. 1 to 3).

    With a mean term, as TLlib has it: ``+ mean_weight * |mean_s - mean_t|^2 / d``. TLlib's covariance term is four
    times the paper's (``1 / d^2``), so its loss is ``4 * coral(source, target, mean_weight=0.25)``.

    Where the samples are few for their width, the covariances are never formed: with ``X`` the centred samples over
    ``sqrt(n - 1)``, ``<X_s^T X_s, X_t^T X_t> = |X_s X_t^T|_F^2``, so three small Gram matrices give the same number.

    Args:
        source: shape ``[N, D]``, at least two samples.
        target: shape ``[M, D]``, at least two samples; ``M`` may differ from ``N``.
        mean_weight: of the distance of the means; 0 for the paper's loss, which does not see them.

    Returns:
        0-d tensor, never negative.

    Raises:
        ConfigurationError: shapes that do not fit, or a negative weight.

    >>> import torch
    >>> coral(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]]))  # (2 - 8)^2 / 4
    tensor(9.)
    """
    check_features(source, target, least=2)
    if not mean_weight >= 0.0:
        raise ConfigurationError(f"Expected `mean_weight` to be 0 or more, but got {mean_weight}.")
    (n, width), m = source.shape, len(target)
    source_mean, target_mean = source.mean(0), target.mean(0)
    x, y = (source - source_mean) / (n - 1) ** 0.5, (target - target_mean) / (m - 1) ** 0.5
    # multiplications of the two forms over the width, there and back: a Gram matrix costs as much again in the backward
    # pass, the product of the domains twice as much
    if 2 * n * n + 2 * m * m + 3 * n * m < 2 * (n + m) * width:
        within = full_precision_gram(x).square().sum() + full_precision_gram(y).square().sum()
        squared = within - 2.0 * full_precision_matmul(x, y.T).square().sum()
        # equal covariances may come out a little below 0: correct the value only, not the gradient
        squared = squared - squared.detach().clamp(max=0.0)
    else:
        squared = (full_precision_gram(x.T) - full_precision_gram(y.T)).square().sum()
    loss = squared / (4.0 * width**2)
    if mean_weight > 0.0:
        loss = loss + mean_weight * (source_mean - target_mean).square().mean()
    return loss
