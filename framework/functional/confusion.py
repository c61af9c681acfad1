"""How often two classes are predicted at the same time, from unlabelled predictions."""

from __future__ import annotations

from torch import Tensor

from framework.functional.entropy import prediction_entropy
from framework.functional.precision import full_precision, full_precision_matmul


@full_precision
def class_confusion(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The class confusion of a batch, each row a distribution (Jin et al. 2020, section 3).

    With ``P = softmax(logits / temperature)`` and ``H`` the entropies of its rows, image ``i`` weighs ``w_i = N (1 +
    exp(-H_i)) / sum over j of (1 + exp(-H_j))``: the certain ones count up to twice as much as the uncertain ones, and
    no gradient flows through that. The confusion ``P^T diag(w) P`` is then divided by the sums of its rows, so that
    rare classes count as much as frequent ones.

    Args:
        logits: shape ``[N, K]``.
        temperature: above 1 it makes overconfident predictions softer.

    Returns:
        Shape ``[K, K]``: how the predictions of class ``j`` are shared among all classes, in row ``j``. A class whose
        probability is below 1e-12 in all images has (nearly) a row of zeros.

    >>> class_confusion(torch.tensor([[0.0, 0.0, -999.0], [-999.0, -999.0, 0.0]]))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """
    scaled = logits / temperature
    probabilities = scaled.softmax(dim=1)
    certainty = 1.0 + (-prediction_entropy(scaled.detach())).exp()
    weights = certainty / certainty.mean()  # their mean is 1
    confusion = full_precision_matmul(probabilities.T, weights[:, None] * probabilities)
    # each row by its own sum. `confusion / confusion.sum(1)` would divide the columns, and differs from this only in
    # that it transposes, as long as the confusion is symmetric
    return confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1e-12)
