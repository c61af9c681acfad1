"""Sums over singular values whose gradients need no derivative of a decomposition.

The singular vectors are taken without a gradient and put into an expression that is linear or quadratic in the matrix:
value and gradient are those of the singular values, both stay finite where some of these are 0 or equal, and the
backward pass has no matrix product that autocast could take to half precision (that of ``svdvals`` does, compiled).
On an accelerator the decomposition waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.functional.precision import full_precision, full_precision_matmul


@full_precision
def nuclear_norm(matrix: Tensor) -> Tensor:
    """The sum of all singular values.

    ``|X|_* = tr(X^T U V^T)`` with ``X = U S V^T``, and ``U V^T`` is its gradient. Where a singular value is 0 the norm
    has a kink, and that is one of its subgradients.

    Args:
        matrix: shape ``[N, D]``.

    Returns:
        0-d tensor.

    >>> nuclear_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    tensor(7.)
    """
    with torch.no_grad():
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        gradient: Tensor = left @ right
    return (matrix * gradient).sum()


@full_precision
def largest_squared_singular_values(matrix: Tensor, count: int = 1) -> Tensor:
    """The sum of the squares of the ``count`` largest singular values.

    ``sum of |X v|^2`` over the right singular vectors, or of ``|X^T u|^2`` over the left ones: of these two the shorter
    ones, from the smaller of the two Gram matrices.

    Args:
        matrix: shape ``[N, D]``.
        count: how many; more than there are means all.

    Returns:
        0-d tensor.

    >>> largest_squared_singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]))
    tensor(16.)
    """
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    with torch.no_grad():
        # in ascending order of the eigenvalues
        vectors = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -count:]
    return full_precision_matmul(tall, vectors).square().sum()


@full_precision
def smallest_squared_singular_values(matrix: Tensor, count: int = 1) -> Tensor:
    """The sum of the squares of the ``count`` smallest of the ``min(N, D)`` singular values.

    ``sum of |X^T u|^2`` over the left singular vectors of a wide matrix, or of ``|X v|^2`` over the right ones of a
    tall one. They come from the matrix itself: in its Gram matrix, whose eigenvalues are the squares, rounding errors
    of the largest would drown the smallest.

    Args:
        matrix: shape ``[N, D]``.
        count: how many; more than there are means all.

    Returns:
        0-d tensor.

    >>> smallest_squared_singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]))
    tensor(9.)
    """
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    with torch.no_grad():
        # of the small triangle, which has the singular values and right singular vectors of the whole
        vectors = torch.linalg.svd(torch.linalg.qr(tall, mode="r").R).Vh[-count:].T
    return full_precision_matmul(tall, vectors).square().sum()
