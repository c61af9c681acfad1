"""The terms of VICReg: values against a loop in float64 and by hand, gradients, invariances, collapse, autocast."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import vicreg_terms


def pair(images: int = 5, width: int = 6) -> tuple[Tensor, Tensor]:
    """Of different spread, so that some dimensions meet the hinge and some do not."""
    spread = torch.linspace(0.2, 2.0, width, dtype=torch.float64)
    return tuple(spread * torch.randn(images, width, dtype=torch.float64) + 3.0 for _ in range(2))  # type: ignore[return-value]


def loop(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """The terms, number by number."""
    images, width = first.shape
    pairs = zip(first.flatten().tolist(), second.flatten().tolist(), strict=True)
    invariance = sum((x - y) ** 2 for x, y in pairs) / (images * width)
    variance = covariance = 0.0
    for view in (first, second):
        columns = view.T.tolist()
        for j, x in enumerate(columns):
            variance += max(0.0, 1 - math.sqrt(statistics.variance(x) + 0.0001)) / width
            covariance += sum(statistics.covariance(x, y) ** 2 for k, y in enumerate(columns) if k != j) / width
    return invariance, variance, covariance


@pytest.mark.parametrize(("images", "width"), [(2, 2), (2, 7), (5, 3), (4, 4), (9, 20), (30, 1)])
def test_values_against_a_loop(images: int, width: int) -> None:
    first, second = pair(images, width)
    found = [float(term) for term in vicreg_terms(first, second)]
    assert found == pytest.approx(loop(first, second), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("images", "width"), [(4, 3), (3, 5)])  # either Gram matrix is the smaller one
@pytest.mark.parametrize("term", [0, 1, 2])
def test_gradients(images: int, width: int, term: int) -> None:
    first, second = pair(images, width)
    inputs = (first.requires_grad_(), second.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: vicreg_terms(x, y)[term], inputs)


def test_what_does_not_matter() -> None:
    """The order of the images, which view is the first; a common offset of both views."""
    first, second = pair()
    expected, order = vicreg_terms(first, second), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(vicreg_terms(first[order], second[order]), expected)
    torch.testing.assert_close(vicreg_terms(second, first), expected)
    torch.testing.assert_close(vicreg_terms(first + 5, second + 5), expected)
    apart = vicreg_terms(first[order], second)
    assert abs(float(apart[0] - expected[0])) > 0.1  # which views belong together matters to the invariance alone
    torch.testing.assert_close(apart[1:], expected[1:])


def test_scales() -> None:
    """Invariance and covariance are a quadratic and a quartic; large embeddings have no lack of variance."""
    first, second = pair()
    terms, larger = vicreg_terms(first, second), vicreg_terms(100 * first, 100 * second)
    torch.testing.assert_close(larger[0], 1e4 * terms[0])
    assert float(larger[1]) == 0
    torch.testing.assert_close(larger[2], 1e8 * terms[2])


def test_perfect_embeddings_cost_nothing() -> None:
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    views = signs[:, 1:]  # centred, uncorrelated, of variance 4 / 3
    assert [float(term) for term in vicreg_terms(views, views)] == [0, 0, 0]


def test_collapse_is_what_the_variance_sees() -> None:
    """All images at one point satisfy the other two terms, and the slope there is finite."""
    same = torch.full((6, 4), 0.25, requires_grad=True)
    invariance, variance, covariance = vicreg_terms(same, same)
    assert (invariance.item(), covariance.item()) == (0, 0)
    assert variance.item() == pytest.approx(2 * (1 - 0.01))
    assert torch.autograd.grad(variance, same)[0].isfinite().all()


def test_wide_embeddings_in_float32() -> None:
    first, second = pair(16, 2048)
    exact = vicreg_terms(first, second)
    found = vicreg_terms(first.float(), second.float())
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(exact), rtol=1e-5, atol=0)


def test_never_negative() -> None:
    """Also where one dimension has all the variance, and the difference of large numbers leaves rounding alone."""
    for seed in range(20):
        torch.manual_seed(seed)
        one = torch.zeros(5, 7)
        one[:, 2] = 1000 * torch.randn(5)
        assert float(vicreg_terms(one, one)[2]) >= 0


def test_float32_under_autocast() -> None:
    first, second = (view.bfloat16() for view in pair(32, 64))
    with torch.autocast("cpu", torch.bfloat16):
        found = vicreg_terms(first, second)
    expected = vicreg_terms(first.float(), second.float())
    assert all(term.dtype == torch.float32 for term in found)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


def test_bad_shapes() -> None:
    with pytest.raises(ConfigurationError, match=r"at least 2 samples, but got \[1, 3\]"):
        vicreg_terms(torch.randn(1, 3), torch.randn(1, 3))
    with pytest.raises(ConfigurationError, match="views of the same images, but got 3 and 2"):
        vicreg_terms(torch.randn(3, 3), torch.randn(2, 3))
