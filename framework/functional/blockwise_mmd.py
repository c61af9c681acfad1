"""The quadratic-time discrepancies of many samples: block by block, value and gradient in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from framework.functional.kernels import joint_mean, kernel_steps
from framework.functional.precision import exact_products

# Rows of a block. 512 x 512 numbers stay in a CPU's cache from one operation to the next; an accelerator wants fewer,
# larger operations, and has the memory: 64 MiB for a float32 block
CPU_ROWS, ACCELERATOR_ROWS = 512, 4096


class Pairs(NamedTuple):
    """What one pair of samples counts in the sum, by the domains of the two; each pair is met in both orders."""

    within_source: float
    within_target: float
    between: float


@torch.compiler.disable  # type: ignore[untyped-decorator]
def blockwise_discrepancy(
    features: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[Sequence[float]],
    bandwidths: Sequence[Tensor],
    weights: Pairs,
) -> Tensor:
    """``sum over i != j of w_ij * prod over layers l of k_l(z_i, z_j)``, over all pairs of the joint sample.

    The matrix of pairs is symmetric and not made whole, but for few samples: of each block on or above the diagonal the
    kernels and their slopes are made, used for the value and for both domains' gradients, and forgotten. Memory is that
    of the features and of a few blocks. A graph of ``torch.compile`` breaks here: loops over blocks are not unrolled.

    The gradient is made with the value, so that the kernels are made once: only the first derivative exists.
    None flows into the bandwidths.

    Args:
        features: each layer's source ``[N, D_l]`` and target ``[M, D_l]``, in float32 or float64.
        scales: each layer's factors of its bandwidth.
        bandwidths: of each layer, 0-d tensors in the unit of a squared distance.
        weights: ``w_ij``. The pairs of a sample with itself are left out: their kernel is a constant.

    Returns:
        0-d tensor. Its backward pass raises a RuntimeError with ``create_graph=True``.
    """
    problem = _Problem([kernel_steps(layer) for layer in scales], bandwidths, weights, torch.is_grad_enabled())
    with exact_products():  # value and gradient are made here
        value: Tensor = _Blockwise.apply(problem, *[domain for layer in features for domain in layer])
    return value


class _Problem(NamedTuple):
    steps: list[list[tuple[float, int | None]]]
    bandwidths: Sequence[Tensor]
    weights: Pairs
    grad_enabled: bool  # inside `forward` it is always off


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: _Problem, *features: Tensor) -> Tensor:
        needs: Sequence[bool] = [needed and problem.grad_enabled for needed in ctx.needs_input_grad[1:]]
        layers = [
            _Layer(source, target, steps, bandwidth, wanted)
            for source, target, steps, bandwidth, *wanted in zip(
                features[::2], features[1::2], problem.steps, problem.bandwidths, needs[::2], needs[1::2], strict=True
            )
        ]
        value = features[0].new_zeros(())
        for rows, columns, weight, weights in _blocks(features[0], features[1], problem.weights):
            kernels = [layer.kernel(rows, columns) for layer in layers]
            product = math.prod([*kernels[1:], *weights], start=kernels[0])
            value.add_(product.sum(), alpha=weight if rows == columns else 2.0 * weight)
            for layer in layers:
                others = [kernel for kernel, other in zip(kernels, layers, strict=True) if other is not layer]
                layer.add_gradient(rows, columns, [*others, *weights], weight)
        gradients = [gradient for layer in layers for gradient in layer.gradients()]
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by `create_graph`; `once_differentiable` would only see that `gradient` has one
            raise RuntimeError("Expected one derivative of the discrepancy, but got `create_graph=True`.")
        return None, *[None if saved is None else saved * gradient for saved in ctx.saved_tensors]


class _Layer:
    """One layer's joint sample, and the gradient with respect to it that the blocks add up.

    With ``s`` the widest scale and ``b`` the bandwidth, the exponent is ``x = -d^2 / (2 s b)``, and with ``K'`` the
    slope by ``x`` of the kernel, times the other layers' kernels and the weights, the gradient of row i is
    ``2 / (s b) * sum over j of K'_ij (z_j - z_i)``: a matrix product and the sums of rows.
    """

    def __init__(
        self,
        source: Tensor,
        target: Tensor,
        steps: list[tuple[float, int | None]],
        bandwidth: Tensor,
        wanted: Sequence[bool],
    ) -> None:
        self.steps, self.source_rows, self.wanted = steps, len(source), wanted
        # distances do not depend on the centre, the terms that they are made of do: in float32 a common offset of 300
        # leaves nothing of an uncentred one
        centre = joint_mean(source, target)
        self.features = torch.cat([source - centre, target - centre])
        self.squared_norms = self.features.square().sum(1)
        widest = steps[0][0]
        # equal features have no distance to scale by: as in `gaussian_kernel_sum`
        self.to_exponent = -1.0 / (2.0 * widest * bandwidth.to(source.dtype).clamp(min=1e-30))
        self.slope: Tensor | None = None
        if any(self.wanted):
            self.pull, self.slopes = torch.zeros_like(self.features), torch.zeros_like(self.squared_norms)

    def kernel(self, rows: slice, columns: slice) -> Tensor:
        """The block of the kernel, with a diagonal of 0; the slope is kept for ``add_gradient``."""
        exponent = self.squared_norms[rows, None] + self.squared_norms[columns]
        exponent.addmm_(self.features[rows], self.features[columns].T, alpha=-2.0)
        exponent.clamp_(min=0.0).mul_(self.to_exponent)  # near duplicates may come out a little below 0
        if rows == columns:
            exponent.fill_diagonal_(-math.inf)
        widest = self.steps[0][0]
        power = exponent.exp()
        if len(self.steps) == 1:
            self.slope = power
            return power
        kernel = power.clone()
        self.slope = power.clone() if any(self.wanted) else None
        for scale, squarings in self.steps[1:]:
            if squarings is None:
                torch.mul(exponent, widest / scale, out=power).exp_()
            for _ in range(squarings or 0):
                power.square_()
            kernel.add_(power)
            if self.slope is not None:
                self.slope.add_(power, alpha=widest / scale)
        return kernel

    def add_gradient(self, rows: slice, columns: slice, others: list[Tensor], weight: float) -> None:
        """Add what the block's pairs contribute: to its rows and, where it is off the diagonal, to its columns.

        ``others`` are what the pairs are multiplied by, beside the weight: the other layers' kernels, for example.
        """
        if not any(self.wanted):
            return
        assert self.slope is not None
        slope = math.prod(others, start=self.slope)
        if self._wants(rows):
            self.pull[rows].addmm_(slope, self.features[columns], alpha=weight)
            self.slopes[rows].add_(slope.sum(1), alpha=weight)
        if self._wants(columns) and rows != columns:
            self.pull[columns].addmm_(slope.T, self.features[rows], alpha=weight)
            self.slopes[columns].add_(slope.sum(0), alpha=weight)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Those of the source and of the target, None where none is wanted."""
        if not any(self.wanted):
            return None, None
        self.pull.addcmul_(self.slopes[:, None], self.features, value=-1.0).mul_(-4.0 * self.to_exponent)
        source, target = self.pull[: self.source_rows], self.pull[self.source_rows :]
        return source if self.wanted[0] else None, target if self.wanted[1] else None

    def _wants(self, rows: slice) -> bool:
        of_source, of_target = self.wanted
        return (of_source and rows.start < self.source_rows) or (of_target and rows.stop > self.source_rows)


class _Block(NamedTuple):
    rows: slice
    columns: slice
    weight: float
    weights: Sequence[Tensor] = ()  # of each pair, where they are not the same


def _blocks(source: Tensor, target: Tensor, weights: Pairs) -> Iterator[_Block]:
    """The blocks on and above the diagonal of the joint sample, the source first."""
    n, m = len(source), len(target)
    size = CPU_ROWS if source.device.type == "cpu" else ACCELERATOR_ROWS
    # all pairs at once: more numbers than on and above the diagonal, but calling operations costs more than those
    if n + m <= size // 2:
        pairs = source.new_full((n + m, n + m), weights.between)
        pairs[:n, :n], pairs[n:, n:] = weights.within_source, weights.within_target
        yield _Block(slice(0, n + m), slice(0, n + m), 1.0, (pairs,))
        return
    of_source = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    of_target = [slice(start, min(start + size, n + m)) for start in range(n, n + m, size)]
    blocks = of_source + of_target  # none has rows of both
    for position, rows in enumerate(blocks):
        for columns in blocks[position:]:
            if columns.start < n:
                yield _Block(rows, columns, weights.within_source)
            else:
                yield _Block(rows, columns, weights.between if rows.start < n else weights.within_target)
