from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from framework.functional import full_precision, full_precision_gram, full_precision_matmul
from framework.networks.outputs import NetworkOutputs


@full_precision
def product(x: Tensor, y: Tensor, *, scale: Tensor | float = 1.0) -> Tensor:
    """A product that autocast would run in half precision."""
    return scale * (x @ y.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_runs_in_float32(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        result = product(x, x, scale=torch.tensor(2.0, dtype=dtype))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, 2.0 * (x.float() @ x.float().T), rtol=0, atol=0)


def test_float64_stays() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(product(x, x), x @ x.T)


def test_autocast_is_on_again_afterwards() -> None:
    x = torch.randn(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        product(x, x)
        assert (x @ x.T).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            product(x, torch.randn(3, 5))
        assert (x @ x.T).dtype == torch.bfloat16


def test_gradients_come_back_in_the_callers_dtype() -> None:
    x = torch.randn(3, 2, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = product(x, x).sum()
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_tuples_lists_and_other_arguments() -> None:
    @full_precision
    def dtypes(outputs: NetworkOutputs, layers: list[Tensor], pair: tuple[Tensor, int], name: str) -> list[torch.dtype]:
        assert isinstance(outputs, NetworkOutputs)
        assert (pair[1], name) == (3, "x")
        assert outputs.labels is None
        assert not torch.is_autocast_enabled("cpu")
        return [value.dtype for value in (*outputs[:2], *layers, pair[0])]

    half = torch.ones(2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dtypes(NetworkOutputs(half, half), [half, half.double()], (half.long(), 3), name="x")
    assert found == [torch.float32, torch.float32, torch.float32, torch.float64, torch.int64]


def test_without_tensors_and_on_the_meta_device() -> None:
    assert full_precision(lambda x: x + 1)(1) == 2
    assert product(torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta")).shape == (2, 4)


def test_keeps_name_and_docstring() -> None:
    assert product.__name__ == "product"
    assert product.__doc__ is not None


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_to_one_graph(autocast: bool) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return product(x, y, scale=2.0).exp().mean()

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explanation = torch._dynamo.explain(loss)(x, y)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    torch.testing.assert_close(compiled, loss(x, y), rtol=1e-6, atol=0)


def test_matmul_and_its_gradients() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(full_precision_matmul(x, y), x @ y)
    assert torch.autograd.gradcheck(full_precision_matmul, (x, y))
    assert torch.autograd.gradcheck(full_precision_matmul, (x, y.detach()))
    assert full_precision_matmul(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_gram_and_its_gradients() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(full_precision_gram(x), x @ x.T)
    assert torch.autograd.gradcheck(full_precision_gram, x)
    assert torch.autograd.gradcheck(lambda x: full_precision_gram(x.T), x)
    assert torch.autograd.gradgradcheck(full_precision_gram, x)
    assert full_precision_gram(x.bfloat16()).dtype == torch.float32


def test_matmul_has_float32_gradients_when_compiled_under_autocast() -> None:
    @full_precision
    def by_ours(x: Tensor, y: Tensor) -> Tensor:
        return full_precision_matmul(x, y).square().sum()

    @full_precision
    def by_our_gram(x: Tensor, y: Tensor) -> Tensor:
        joint = torch.cat([x, y.T])  # the block above the diagonal is the product
        return full_precision_gram(joint)[: len(x), len(x) :].square().sum()

    @full_precision
    def by_torch(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y).square().sum()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, generator=generator, requires_grad=True)
    y = torch.randn(5, 6, generator=generator, requires_grad=True)
    expected = torch.autograd.grad(by_torch(x, y), [x, y])

    def off_by(function: Callable[[Tensor, Tensor], Tensor]) -> float:
        torch._dynamo.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.compile(function, fullgraph=True, backend="aot_eager")(x, y)
        gradients = torch.autograd.grad(loss, [x, y])
        return max((a - b).abs().max().item() for a, b in zip(gradients, expected, strict=True))

    assert off_by(by_ours) < 1e-5
    assert off_by(by_our_gram) < 1e-5
    # once torch computes the backward pass as it would uncompiled, full_precision_matmul can go
    assert off_by(by_torch) > 1e-2
