"""Optimal transport between two samples with equal weights in each."""

from __future__ import annotations

import importlib
import importlib.util
import math

import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional.precision import full_precision


@full_precision
def sinkhorn_coupling(cost: Tensor, entropic_regularization: float = 0.05, iterations: int = 50) -> Tensor:
    """The coupling of least cost but for an entropy term, by Sinkhorn's iterations (Cuturi 2013, arXiv:1306.0895).

    In logarithms, so that no small regularisation underflows. The last step rounds to the nearest coupling (Altschuler
    et al. 2017, arXiv:1705.09634, algorithm 2): the marginals are right however few the iterations. No gradient. Runs
    on the cost's device and compiles.

    Args:
        cost: of moving source row ``i`` to target column ``j``, shape ``[N, M]``.
        entropic_regularization: weight of the entropy, as a multiple of the mean cost above the least one: neither the
            cost's unit nor a common offset counts. The smaller, the nearer to the exact coupling, and the more
            iterations it takes.
        iterations: how many.

    Returns:
        Shape ``[N, M]``, not negative, with rows that sum to ``1 / N`` and columns that sum to ``1 / M``.

    Raises:
        ConfigurationError: not a matrix, or an option that is not positive.

    >>> sinkhorn_coupling(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).round(decimals=4)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    _check(cost)
    if not (entropic_regularization > 0.0 and math.isfinite(entropic_regularization)):
        raise ConfigurationError(
            f"Expected `entropic_regularization` to be above 0, but got {entropic_regularization}."
        )
    if iterations < 1:
        raise ConfigurationError(f"Expected `iterations` to be at least 1, but got {iterations}.")
    cost = cost.detach()
    rows, columns = cost.shape
    cost = cost - cost.min()  # what all moves cost alike decides nothing, and would only widen the regularisation
    kernel = -cost / (entropic_regularization * cost.mean()).clamp(min=torch.finfo(cost.dtype).tiny)
    log_row, log_column = -math.log(rows), -math.log(columns)
    column_potential = cost.new_zeros(columns)
    for _ in range(iterations):
        row_potential = log_row - (kernel + column_potential).logsumexp(dim=1)
        column_potential = log_column - (kernel + row_potential[:, None]).logsumexp(dim=0)
    coupling = (kernel + row_potential[:, None] + column_potential).exp()
    # rounding: shrink what is too heavy, then spread what is missing
    coupling = coupling * (1.0 / rows / coupling.sum(dim=1)).clamp(max=1.0)[:, None]
    coupling = coupling * (1.0 / columns / coupling.sum(dim=0)).clamp(max=1.0)
    missing_row = (1.0 / rows - coupling.sum(dim=1)).clamp(min=0.0)
    missing_column = (1.0 / columns - coupling.sum(dim=0)).clamp(min=0.0)
    missing = missing_row.sum().clamp(min=torch.finfo(cost.dtype).tiny)
    return coupling + missing_row[:, None] * (missing_column / missing)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def exact_coupling(cost: Tensor) -> Tensor:
    """The coupling of least cost, by the network simplex of the package POT.

    On the host: the cost goes there and the coupling comes back, which waits for the device, and a graph of
    ``torch.compile`` breaks here. No gradient.

    Args:
        cost: of moving source row ``i`` to target column ``j``, shape ``[N, M]``.

    Returns:
        Shape ``[N, M]``, in the cost's type, with rows that sum to ``1 / N`` and columns that sum to ``1 / M``.

    Raises:
        ConfigurationError: not a matrix, or POT is not installed.
    """
    _check(cost)
    check_transport_package()
    solve = importlib.import_module("ot").emd
    found = solve([], [], cost.detach().double().cpu().numpy())  # no weights: equal ones
    return torch.from_numpy(found).to(cost)


def check_transport_package() -> None:
    """Raise a ConfigurationError unless the package POT is installed."""
    if importlib.util.find_spec("ot") is None:
        raise ConfigurationError(
            "Expected the package POT for exact transport, but it is not installed. Install the extra: "
            "pip install 'transfer-framework[transport]', or use `--model.transport sinkhorn`."
        )


def _check(cost: Tensor) -> None:
    if cost.ndim != 2 or 0 in cost.shape:
        raise ConfigurationError(f"Expected `cost` to have shape [rows, columns], but got {list(cost.shape)}.")
