"""NT-Xent: value against a loop in float64, values by hand, gradients, invariances, autocast."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import nt_xent


def pair(images: int = 5, width: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(images, width, dtype=torch.float64), torch.randn(images, width, dtype=torch.float64)


def cosine(x: list[float], y: list[float]) -> float:
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def loop(first: Tensor, second: Tensor, temperature: float) -> float:
    """One view after the other, as the paper's equation 1 and algorithm 1 say it."""
    views = [view for both in zip(first.tolist(), second.tolist(), strict=True) for view in both]
    total = 0.0
    for i, view in enumerate(views):
        other = i + 1 if i % 2 == 0 else i - 1
        denominator = sum(math.exp(cosine(view, views[k]) / temperature) for k in range(len(views)) if k != i)
        total -= math.log(math.exp(cosine(view, views[other]) / temperature) / denominator)
    return total / len(views)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(("images", "width"), [(2, 1), (2, 5), (3, 2), (7, 4), (16, 32)])
def test_value_against_a_loop(images: int, width: int, temperature: float) -> None:
    first, second = pair(images, width)
    assert float(nt_xent(first, second, temperature)) == pytest.approx(loop(first, second, temperature), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_orthogonal_images_with_equal_views(temperature: float) -> None:
    """The other view at cosine 1, the 2 N - 2 of other images at 0."""
    views = torch.eye(4, dtype=torch.float64)
    expected = math.log(1 + 6 * math.exp(-1 / temperature))
    assert float(nt_xent(views, views, temperature)) == pytest.approx(expected)


def test_collapse_is_chance() -> None:
    same = torch.ones(4, 3, dtype=torch.float64)
    assert float(nt_xent(same, same, 0.1)) == pytest.approx(math.log(7))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_gradients(temperature: float) -> None:
    first, second = pair(4, 3)
    inputs = (first.requires_grad_(), second.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: nt_xent(x, y, temperature), inputs)


def test_what_does_not_matter() -> None:
    """The order of the images, which view is the first, and the projections' lengths."""
    first, second = pair()
    expected, order = nt_xent(first, second), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(nt_xent(first[order], second[order]), expected)
    torch.testing.assert_close(nt_xent(second, first), expected)
    lengths = torch.tensor([0.01, 1.0, 3.0, 100.0, 7.0])[:, None]
    torch.testing.assert_close(nt_xent(lengths * first, second / lengths), expected)
    assert nt_xent(first[order], second) != pytest.approx(float(expected), rel=1e-3)  # which views belong together does


def test_descending_brings_views_together() -> None:
    first, second = pair(8, 6)
    first.requires_grad_()
    optimizer = torch.optim.Adam([first], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        nt_xent(first, second, 0.1).backward()
        optimizer.step()
    nearest = (torch.nn.functional.normalize(first, dim=1) @ second.T / second.norm(dim=1)).argmax(1)
    assert nearest.tolist() == list(range(8))


def test_float32_under_autocast() -> None:
    first, second = (view.bfloat16() for view in pair(32, 64))
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent(first, second, 0.1)
    assert found.dtype == torch.float32
    assert torch.equal(found, nt_xent(first.float(), second.float(), 0.1))


def test_gradient_in_float32_when_compiled_under_autocast() -> None:
    def gradient(function: object) -> Tensor:
        first, second = (view.float() for view in pair(16, 32))
        first.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(first, second, 0.1)  # type: ignore[operator]
        return torch.autograd.grad(loss, first)[0]

    torch.manual_seed(3)
    expected = gradient(nt_xent)
    torch.manual_seed(3)
    compiled = gradient(torch.compile(nt_xent, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 3), (1, 3)), "`first` to have shape .samples, features. with at least 2 samples, but got .1, 3."),
        (((3, 3), (2, 3)), "views of the same images, but got 3 and 2"),
        (((3, 3), (3, 2)), "`first` and `second` to have the same number of features, but got 3 and 2"),
        (((3, 2, 3), (3, 2, 3)), "but got .3, 2, 3."),
    ],
)
def test_bad_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        nt_xent(torch.randn(shapes[0]), torch.randn(shapes[1]))
