"""Variance, invariance and covariance of the embeddings of two views of images."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.functional.nt_xent import check_same_images
from framework.functional.precision import full_precision, full_precision_matmul


@full_precision
def vicreg_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of VICReg (Bardes et al. 2022): views agree, dimensions vary, dimensions are not correlated.

    *Invariance* is the mean of the squared differences over images and dimensions, as in the paper's pseudocode and in
    its code; its text has the sum over the dimensions, with which the published weights would not fit. *Variance* is
    the mean over the dimensions of ``max(0, 1 - sqrt(v + 0.0001))``, ``v`` being a dimension's unbiased variance over
    the images, and *covariance* the sum of the squared covariances of different dimensions, over ``D``. Both are
    summed over the two views, as in the paper; the published code has half of the variance term, which is half of its
    weight.

    Args:
        first: embeddings of one view of each image, shape ``[N, D]``.
        second: embeddings of another view of the same images in the same order, shape ``[N, D]``.

    Returns:
        Invariance, variance and covariance, 0-d tensors, none negative.

    Raises:
        ConfigurationError: other shapes, or a single image, which has no variance.

    >>> first = torch.tensor([[0.0, 0.0], [2.0, 4.0]])  # variances 2 and 8, covariance 4
    >>> vicreg_terms(first, torch.zeros(2, 2))  # (4 + 16) / 4; 0 + (1 - 0.01); 2 * 16 / 2 + 0
    (tensor(5.), tensor(0.9900), tensor(16.))
    """
    check_same_images(first, second)
    invariance = (first - second).square().mean()
    views = [view - view.mean(dim=0) for view in (first, second)]
    variance = torch.stack([_lack_of_variance(view) for view in views]).sum()
    covariance = torch.stack([_squared_covariances(view) for view in views]).sum()
    return invariance, variance, covariance


def _lack_of_variance(centred: Tensor) -> Tensor:
    deviations = (centred.square().sum(dim=0) / (len(centred) - 1) + 1e-4).sqrt()  # the root's slope stays finite
    return (1.0 - deviations).relu().mean()


def _squared_covariances(centred: Tensor) -> Tensor:
    images, width = centred.shape
    scaled = centred / (images - 1) ** 0.5
    # of the two Gram matrices the smaller one, since their entries have the same sum of squares: with an expander of
    # 8192 dimensions and 256 images that is 1 / 32 of the work, and no [8192, 8192] is ever stored
    tall = scaled if images >= width else scaled.T
    every = full_precision_matmul(tall.T, tall).square().sum()
    between: Tensor = every - scaled.square().sum(dim=0).square().sum()
    # rounding may leave it a little below 0: correct the value only, not the gradient
    return (between - between.detach().clamp(max=0.0)) / width
