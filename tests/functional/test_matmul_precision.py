"""``--trainer.float32_matmul_precision``: it is set, and losses on features stay exact."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from framework import Trainer
from framework.errors import ConfigurationError
from framework.functional import full_precision, full_precision_gram, full_precision_matmul
from framework.functional.blockwise_mmd import Pairs, blockwise_discrepancy
from framework.functional.correlation_alignment import coral
from framework.functional.precision import exact_products, products_are_exact

SETTINGS = ("high", "medium")


@pytest.fixture(autouse=True)
def setting() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The setting under which each product was computed; this CPU may compute all of them alike."""
    found = []
    for name in ("__matmul__", "addmm_"):
        original = getattr(Tensor, name)

        def noted(*args: Any, original: Any = original, **keywords: Any) -> Tensor:
            found.append(torch.get_float32_matmul_precision())
            result: Tensor = original(*args, **keywords)
            return result

        monkeypatch.setattr(Tensor, name, noted)
    return found


def both(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Value and gradients."""
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@full_precision
def formula(x: Tensor, y: Tensor) -> Tensor:
    return (full_precision_gram(x).square().sum() - full_precision_matmul(x, y.T).square().sum()) / 100


@full_precision
def plain(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).square().sum()


def blockwise(x: Tensor, y: Tensor) -> Tensor:
    return blockwise_discrepancy([(x, y)], [[1.0, 2.0]], [torch.tensor(3.0)], Pairs(1.0, 1.0, -1.0))


def several_blocks(x: Tensor, y: Tensor) -> Tensor:
    return blockwise(x.repeat(8, 1), y.repeat(8, 1))


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 30, generator=generator, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("given", SETTINGS)
@pytest.mark.parametrize("function", [formula, blockwise, several_blocks, coral])
def test_products_of_forward_and_backward_are_exact(
    function: Callable[..., Tensor], given: str, seen: list[str]
) -> None:
    expected = both(function, *inputs())
    count = len(seen)
    assert count >= (2 if function is blockwise else 4)
    seen.clear()
    torch.set_float32_matmul_precision(given)
    found = both(function, *inputs())
    assert seen == ["highest"] * count
    assert torch.get_float32_matmul_precision() == given
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("given", SETTINGS)
def test_a_product_of_the_formulas_own(given: str, seen: list[str]) -> None:
    torch.set_float32_matmul_precision(given)
    plain(*inputs())
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == given
    with pytest.raises(RuntimeError):
        plain(torch.ones(2, 3), torch.ones(2, 4))
    assert torch.get_float32_matmul_precision() == given


def test_this_cpu_has_inexact_products_at_all() -> None:
    """Where oneDNN takes "medium" as a leave to use another way, the numbers tell, too."""
    x = torch.randn(64, 2048)
    expected = x @ x.T
    torch.set_float32_matmul_precision("medium")
    if torch.equal(x @ x.T, expected):
        pytest.skip("medium is highest here")
    assert torch.equal(full_precision_matmul(x, x.T), expected)
    assert torch.equal(full_precision_gram(x), expected)
    assert not torch.equal(x @ x.T, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, exact in both passes; compiled anew where the setting changes."""
    x, y = inputs()
    compiled = torch.compile(formula, fullgraph=True, backend=backend)
    expected = both(formula, x, y)
    calls = []
    enter = exact_products

    def noted() -> Any:
        calls.append(torch.get_float32_matmul_precision())
        return enter()

    monkeypatch.setattr("framework.functional.precision.exact_products", noted)
    for given, count in (("highest", 0), ("high", 5), ("highest", 0)):
        torch.set_float32_matmul_precision(given)
        calls.clear()
        found = both(compiled, x, y)
        assert calls == [given] * count
        assert torch.get_float32_matmul_precision() == given
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_in_float64_and_under_autocast() -> None:
    torch.set_float32_matmul_precision("high")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(full_precision_gram, x)
    assert torch.autograd.gradgradcheck(full_precision_gram, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert full_precision_gram(x.detach().bfloat16()).dtype == torch.float32


def test_the_setting_belongs_to_the_process() -> None:
    torch.set_float32_matmul_precision("high")
    found = []
    with exact_products():
        thread = threading.Thread(target=lambda: found.append(products_are_exact()))
        thread.start()
        thread.join()
    assert found == [True]
    assert not products_are_exact()


def test_what_torch_cannot_answer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert torch.equal(full_precision_gram(torch.eye(2)), torch.eye(2))


# ---------------------------------------------------------------------- the Trainer's option
@pytest.mark.parametrize("given", ["highest", "high", "medium"])
def test_the_option_sets_it(given: str) -> None:
    torch.set_float32_matmul_precision("high" if given == "highest" else "highest")
    Trainer(logger=False, accelerator="cpu", float32_matmul_precision=given)
    assert torch.get_float32_matmul_precision() == given
    Trainer(logger=False, accelerator="cpu")
    assert torch.get_float32_matmul_precision() == given


def test_another_word_is_refused() -> None:
    message = "`--trainer.float32_matmul_precision` to be highest, high or medium, but got 'tf32'"
    with pytest.raises(ConfigurationError, match=message):
        Trainer(float32_matmul_precision="tf32")
    assert torch.get_float32_matmul_precision() == "highest"
