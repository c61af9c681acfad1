"""Jigsaw puzzles: images cut into a grid of pieces, put in another order and back together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.errors import ConfigurationError

ALL, DRAWN = math.factorial(9), 100_000
"""Up to so many permutations are all candidates; where there are more, so many are drawn at random."""


def maximal_hamming_permutations(pieces: int, count: int, seed: int = 0, first: Sequence[int] | None = None) -> Tensor:
    """Permutations that differ from each other in as many places as possible (Noroozi & Favaro 2016, algorithm 1).

    Greedy: each next one has the largest *mean* Hamming distance to those chosen, as in the paper and in the codes that
    follow it. Many candidates share the largest mean: among these the one with the largest *minimum* distance is taken,
    and among those still equal a random one: by the mean alone, nine permutations of 9 pieces that differ everywhere
    would make every other one equally good as the tenth, also one that differs from one of them by a single swap.

    Of up to 9 pieces all permutations are candidates (362,880); of more, 100,000 random ones.

    Args:
        pieces: how many are permuted.
        count: how many permutations.
        seed: of the first permutation and of the choice among equals.
        first: the permutation to begin with; default: a random one.

    Returns:
        int64, shape ``[count, pieces]``, all different: a function of the arguments.

    Raises:
        ConfigurationError: more permutations than there are, or ``first`` is none.

    >>> maximal_hamming_permutations(3, 3, first=(0, 1, 2))[1:].sum(dim=0)  # the two that leave no piece in its place
    tensor([3, 2, 1])
    """
    if pieces < 1 or not 1 <= count <= math.factorial(pieces):
        raise ConfigurationError(
            f"Expected between 1 and {max(pieces, 1)}! permutations of 1 piece or more, but got {count} of {pieces}."
        )
    if first is not None and sorted(first) != list(range(pieces)):
        raise ConfigurationError(f"Expected `first` to be a permutation of 0 to {pieces - 1}, but got {list(first)}.")
    generator = torch.Generator().manual_seed(seed)
    candidates = _candidates(pieces, count, generator)
    start = candidates[torch.randint(len(candidates), (), generator=generator)]
    chosen = [start if first is None else torch.tensor(list(first), dtype=torch.uint8)]
    total = torch.zeros(len(candidates), dtype=torch.int32)  # distances to those chosen: their sum and their minimum
    nearest = torch.full((len(candidates),), pieces, dtype=torch.int32)
    while len(chosen) < count:
        distances = (candidates != chosen[-1]).sum(dim=1, dtype=torch.int32)
        total += distances
        nearest = torch.minimum(nearest, distances)
        score = (total * (pieces + 1) + nearest).where(nearest > 0, -1)  # 0 away: chosen already
        best = (score == score.max()).nonzero().flatten()
        chosen.append(candidates[best[torch.randint(len(best), (), generator=generator)]])
    return torch.stack(chosen).long()


def _candidates(pieces: int, count: int, generator: torch.Generator) -> Tensor:
    if math.factorial(pieces) <= ALL:
        every = bytearray(itertools.chain.from_iterable(itertools.permutations(range(pieces))))
        return torch.frombuffer(every, dtype=torch.uint8).view(-1, pieces)
    return torch.rand(max(DRAWN, 2 * count), pieces, generator=generator).argsort(dim=1).to(torch.uint8)


def cut_pieces(images: Tensor, grid: int) -> Tensor:
    """Cut images into ``grid x grid`` equal pieces, row by row.

    Where a side is no multiple of the grid, the largest multiple in the centre is cut: up to ``grid - 1`` rows and
    columns at the border are left out.

    Args:
        images: shape ``[N, C, H, W]``.
        grid: pieces in a row and in a column.

    Returns:
        Shape ``[N, grid * grid, C, H // grid, W // grid]``.

    Raises:
        ConfigurationError: an image has fewer pixels than pieces along a side.

    >>> cut_pieces(torch.arange(16).view(1, 1, 4, 4), 2)[0, 1, 0]
    tensor([[2, 3],
            [6, 7]])
    """
    if images.dim() != 4 or not 1 <= grid <= min(images.shape[2:]):
        raise ConfigurationError(
            f"Expected images [N, C, H, W] of at least one pixel a piece in a {grid} x {grid} grid, but got "
            f"{list(images.shape)}."
        )
    count, channels, *sides = images.shape
    height, width = (side // grid for side in sides)
    top, left = ((side % grid) // 2 for side in sides)
    centre = images[:, :, top : top + grid * height, left : left + grid * width]
    return (
        centre.reshape(count, channels, grid, height, grid, width).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    )  # [N, row, column, C, h, w]


def assemble(pieces: Tensor, grid: int, size: Sequence[int] | None = None) -> Tensor:
    """Put pieces together to images, row by row: the inverse of :func:`cut_pieces`, but for what that left out.

    Args:
        pieces: shape ``[N, grid * grid, C, h, w]``.
        grid: pieces in a row and in a column.
        size: ``(H, W)`` of the images; where that is more than the pieces fill, each lies in the centre of a cell of
            ``H // grid`` times ``W // grid`` pixels, these in the centre of the image, and between and around them are
            zeros, the mean colour of normalised images. Default: ``(grid * h, grid * w)``.

    Returns:
        Shape ``[N, C, H, W]``.

    >>> pieces = cut_pieces(torch.tensor([[[[1, 2], [3, 4]]]]), 2)
    >>> assemble(permute_pieces(pieces, torch.tensor([[3, 1, 0, 2]])), 2, size=(3, 3))[0, 0]
    tensor([[4, 2, 0],
            [1, 3, 0],
            [0, 0, 0]])
    """
    if size is not None:
        pieces = _framed(pieces, size[0] // grid, size[1] // grid)
    count, _, channels, height, width = pieces.shape
    rows = pieces.reshape(count, grid, grid, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    images = rows.reshape(count, channels, grid * height, grid * width)  # of [N, C, row, h, column, w]
    return images if size is None else _framed(images, size[0], size[1])


def _framed(images: Tensor, height: int, width: int) -> Tensor:
    rows, columns = height - images.shape[-2], width - images.shape[-1]
    if rows == columns == 0:
        return images
    return F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def permute_pieces(pieces: Tensor, permutations: Tensor) -> Tensor:
    """Each image's pieces in another order: place ``p`` of image ``n`` gets its piece ``permutations[n, p]``.

    Args:
        pieces: shape ``[N, P, ...]``.
        permutations: int64, shape ``[N, P]``; the ``argsort`` of each row undoes it.

    Returns:
        Shape ``[N, P, ...]``.

    >>> permute_pieces(torch.tensor([[10, 11, 12]]), torch.tensor([[2, 0, 1]]))
    tensor([[12, 10, 11]])
    """
    return pieces[torch.arange(len(pieces), device=pieces.device)[:, None], permutations]


def crop_pieces(pieces: Tensor, gap: int) -> Tensor:
    """A random part of each piece, ``gap`` pixels shorter along each side: neighbours then share no edge to compare.

    Args:
        pieces: shape ``[N, P, C, h, w]``.
        gap: in pixels, below the sides of a piece.

    Returns:
        Shape ``[N, P, C, h - gap, w - gap]``.
    """
    count, places, channels, height, width = pieces.shape
    rows, columns = (
        torch.randint(gap + 1, (count, places, 1), device=pieces.device)
        + torch.arange(side - gap, device=pieces.device)
        for side in (height, width)
    )
    pieces = pieces.gather(3, rows[:, :, None, :, None].expand(-1, -1, channels, -1, width))
    return pieces.gather(4, columns[:, :, None, None, :].expand(-1, -1, channels, height - gap, -1))
