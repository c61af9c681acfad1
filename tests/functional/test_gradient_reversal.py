from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from framework.errors import ConfigurationError
from framework.functional import reversal_coefficient, reverse_gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 2.0])
def test_identity_forward_and_minus_the_coefficient_backward(dtype: torch.dtype, value: float) -> None:
    features = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    coefficient = torch.tensor(value)
    weights = torch.randn(4, 3, dtype=dtype)

    reversed_features = reverse_gradient(features, coefficient)
    assert torch.equal(reversed_features, features)
    assert reversed_features.dtype == dtype

    (reversed_features * weights).sum().backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad, (-value * weights.double()).to(dtype), rtol=1e-2, atol=1e-3)


def test_discriminator_descends_and_extractor_ascends() -> None:
    torch.manual_seed(0)
    extractor, discriminator = nn.Linear(5, 4), nn.Linear(4, 1)
    images, coefficient = torch.randn(6, 5), torch.tensor(0.7)

    def gradients(reverse: bool) -> tuple[Tensor, Tensor]:
        features = extractor(images)
        loss = discriminator(reverse_gradient(features, coefficient) if reverse else features).square().mean()
        return torch.autograd.grad(loss, [extractor.weight, discriminator.weight])

    plain, reverse = gradients(False), gradients(True)
    torch.testing.assert_close(reverse[0], -0.7 * plain[0])
    torch.testing.assert_close(reverse[1], plain[1])


def test_no_gradient_to_the_coefficient() -> None:
    features, coefficient = torch.ones(2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    reverse_gradient(features, coefficient).sum().backward()
    assert coefficient.grad is None


@pytest.mark.parametrize("coefficient", [torch.ones(1), torch.ones(2, 2), 0.5])
def test_coefficient_must_be_a_0d_tensor(coefficient: object) -> None:
    with pytest.raises(ConfigurationError, match="Expected `coefficient` to be a 0-d tensor, but got"):
        reverse_gradient(torch.ones(2, 2), coefficient)  # type: ignore[arg-type]


def test_under_autocast() -> None:
    layer, features = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    gradients = []
    for wrap in (lambda x: x, lambda x: reverse_gradient(x, torch.tensor(0.5))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(wrap(features)).float().sum()
        gradients += torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradients[1], -0.5 * gradients[0])


def test_does_not_wait_for_the_device() -> None:
    operations = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            operations.append(str(function))
            return function(*args, **(kwargs or {}))

    features = torch.ones(2, requires_grad=True)
    with Watch():
        reverse_gradient(features, reversal_coefficient(torch.tensor(0.5))).sum().backward()
    assert operations
    assert not any("_local_scalar_dense" in name for name in operations)


def test_one_compiled_graph_serves_all_coefficients() -> None:
    def step(features: Tensor, progress: Tensor) -> Tensor:
        return (reverse_gradient(2.0 * features, reversal_coefficient(progress)) ** 2).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in (0.0, 0.1, 0.5, 1.0):
        features = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (expected,) = torch.autograd.grad(step(features, torch.tensor(value)), features)
        (found,) = torch.autograd.grad(compiled(features, torch.tensor(value)), features)
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1
