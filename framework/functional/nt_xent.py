"""The normalised temperature-scaled cross-entropy between two views of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.contrast import unit_length
from framework.functional.kernels import check_features
from framework.functional.precision import full_precision, full_precision_matmul


@full_precision
def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Mean cross-entropy of telling an image's other view from all other views of the batch (Chen et al. 2020, eq. 1).

    With ``s`` the cosine of two views over the temperature and ``j(i)`` the other view of the image of view ``i``,

        ``mean over all 2 N views i of log (sum over the 2 N - 1 views k other than i of exp s_ik) - s_i,j(i)``

    Args:
        first: projections of one view of each image, any lengths but 0, shape ``[N, D]``.
        second: projections of another view of the same images in the same order, shape ``[N, D]``.
        temperature: of the softmax, above 0.

    Returns:
        0-d tensor; ``log(2 N - 1)`` where all projections are the same.

    Raises:
        ConfigurationError: other shapes, or a single image, which has no others to be told from.

    >>> views = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # the other view at cosine 1, both views of the other image at 0
    >>> nt_xent(views, views, temperature=1.0)  # log(1 + 2 / e)
    tensor(0.5514)
    """
    check_same_images(first, second)
    views = torch.cat([unit_length(first), unit_length(second)])  # [2 N, D]
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    similarities = (full_precision_matmul(views, views.T) / temperature).masked_fill(itself, -torch.inf)
    other_view = torch.arange(len(views), device=views.device).roll(len(first))
    return F.cross_entropy(similarities, other_view)


def check_same_images(first: Tensor, second: Tensor) -> None:
    """Raise a ConfigurationError unless both views are of equally many images, two at least: ``[N, D]`` each."""
    check_features(first, second, least=2, names=("first", "second"))
    if len(first) != len(second):
        raise ConfigurationError(
            f"Expected `first` and `second` to be views of the same images, but got {len(first)} and {len(second)}."
        )
