"""Losses in float32, whatever the Trainer's precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

HALF_PRECISION = (torch.float16, torch.bfloat16)
# asked once, here: torch 2.11 cannot compile the question ("meta" has no autocast)
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(device)
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # guarded: a change of TF32 compiles anew
def products_are_exact() -> bool:
    """Whether matrix products of float32 tensors are computed in float32, as they are by default.

    They are not after ``torch.set_float32_matmul_precision("high" | "medium")``, which is what
    ``--trainer.float32_matmul_precision`` calls.
    """
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch.backends…fp32_precision, which this question does not know: left as it is
        return True


@contextmanager
def exact_products() -> Iterator[None]:
    """Within this context, matrix products of float32 tensors are computed in float32, whatever is set.

    The setting is the process's: another thread that multiplies meanwhile is exact, too. An accelerator's kernel is
    chosen where it is launched, so nothing waits. Not for a function that is compiled.
    """
    if products_are_exact():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a formula to run in float32 with autocast off and exact matrix products.

    Distances and kernels lose their value in half precision: an MMD under bf16 autocast is off by more than its own
    size, and in float16 it overflows. float16 and bfloat16 tensors among the arguments, also those in tuples, named
    tuples and lists, are cast up to float32; float32, float64 and integer tensors stay as they are. Gradients come
    back in the dtype of the caller's tensors. Compiles into the caller's graph; for a matrix product inside the formula
    use ``full_precision_matmul``, which keeps its gradient in float32 there too, and stays exact under
    ``--trainer.float32_matmul_precision`` in the backward pass and in compiled code.

    >>> @full_precision
    ... def squared_norm(features: Tensor) -> Tensor:
    ...     return features.square().sum()
    >>> squared_norm(torch.full((4,), 200.0, dtype=torch.float16))  # float16 ends at 65504
    tensor(160000.)
    """

    @functools.wraps(function)
    def in_full_precision(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling() and not products_are_exact():
            with exact_products():
                return in_full_precision(*args, **kwargs)
        arguments: tuple[Any, ...] = tuple(_cast_up(value) for value in args)
        keywords: dict[str, Any] = {name: _cast_up(value) for name, value in kwargs.items()}
        device = _device_type((*arguments, *keywords.values()))
        # asking first keeps a decorated function that calls another one from paying for a second context
        if device is None or not _autocasts(device):
            return function(*arguments, **keywords)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **keywords)

    return in_full_precision


@full_precision
def full_precision_matmul(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` in float32, and its gradient as well.

    ``torch.compile`` traces the backward pass under the autocast that is on around the *compiled call*, whatever the
    forward pass switched off inside (``torch._functorch.config.backward_pass_autocast``): a plain product in a
    ``full_precision`` formula would then have a bfloat16 gradient. Uncompiled, the two are the same.

    Args:
        x: shape ``[N, D]``.
        y: shape ``[D, M]``.

    Returns:
        Shape ``[N, M]``.
    """
    product: Tensor = _Product.apply(x, y)
    return product


@full_precision
def full_precision_gram(x: Tensor) -> Tensor:
    """``x @ x.T`` as ``full_precision_matmul`` has it, with one product in the backward pass and not two.

    Args:
        x: shape ``[N, D]``.

    Returns:
        Shape ``[N, N]``.

    >>> full_precision_gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[5., 6.],
            [6., 9.]])
    """
    product: Tensor = _Gram.apply(x)
    return product


def _exact(x: Tensor, y: Tensor) -> Tensor:
    if products_are_exact():
        return x @ y
    if torch.compiler.is_compiling():
        product: Tensor = _exact_product(x, y)
        return product
    with exact_products():
        return x @ y


# what compiled code can neither set nor ask: an operation that it calls as it is
@torch.library.custom_op("framework::exact_product", mutates_args=())
def _exact_product(x: Tensor, y: Tensor) -> Tensor:
    with exact_products():
        return x @ y


@_exact_product.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], y.shape[1])


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _exact(x, x.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            return _exact(gradient + gradient.T, x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return _exact(x, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        for_x, for_y = ctx.needs_input_grad
        with torch.autocast(gradient.device.type, enabled=False):
            return _exact(gradient, y.T) if for_x else None, _exact(x.T, gradient) if for_y else None


def _autocasts(device: str) -> bool:
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def _cast_up(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF_PRECISION else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[_cast_up(item) for item in value])
    if isinstance(value, tuple):
        return tuple([_cast_up(item) for item in value])
    if isinstance(value, list):
        return [_cast_up(item) for item in value]
    return value


def _device_type(values: Iterable[Any]) -> str | None:
    """The device type of the arguments; the CPU's only where no tensor is on an accelerator.

    A 0-d tensor on the CPU (a coefficient) may stand before features on an accelerator.
    """
    found = None
    for value in values:
        here = value.device.type if isinstance(value, Tensor) else None
        if isinstance(value, (tuple, list)):
            here = _device_type(value)
        if here is not None and here != "cpu":
            return here
        found = found or here
    return found
