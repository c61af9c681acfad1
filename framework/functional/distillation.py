"""A network's predictions as the targets of another's."""

from __future__ import annotations

from torch import Tensor

from framework.functional.precision import full_precision


@full_precision
def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, squared_temperature: bool = True
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's softened predictions to the student's (Hinton et al. 2015).

    ``T^2 * mean over the images of sum over k of p_k (log p_k - log q_k)`` with ``p = softmax(teacher_logits / T)`` and
    ``q = softmax(student_logits / T)``. It differs from the cross-entropy of the same two by the teacher's entropy,
    which has no gradient, and is 0 where the two agree. No gradient flows to the teacher.

    Args:
        student_logits: shape ``[N, K]``.
        teacher_logits: shape ``[N, K]``.
        temperature: ``T``, above 0; above 1 the small probabilities count more.
        squared_temperature: multiply by ``T^2``: the gradient shrinks as ``1 / T^2``, and so keeps its scale beside
            that of a cross-entropy on labels whatever ``T`` is (Hinton et al. 2015, arXiv:1503.02531, section 2).

    Returns:
        0-d tensor, 0 or more.

    >>> distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1000.0, 0.0]]))
    tensor(0.6931)
    """
    teacher = (teacher_logits.detach() / temperature).log_softmax(dim=1)
    student = (student_logits / temperature).log_softmax(dim=1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=1).mean()
    return temperature**2 * divergence if squared_temperature else divergence
