"""Puzzles: pieces and permutations against arrays written by hand, the table against a brute-force greedy search."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from framework.errors import ConfigurationError
from framework.functional import assemble, crop_pieces, cut_pieces, maximal_hamming_permutations, permute_pieces

COUNTING = torch.arange(1, 17).view(1, 1, 4, 4)


# ---------------------------------------------------------------------- pieces
def test_pieces_by_hand() -> None:
    pieces = cut_pieces(COUNTING, 2)
    assert pieces.shape == (1, 4, 1, 2, 2)
    assert pieces[0, :, 0].tolist() == [
        [[1, 2], [5, 6]],
        [[3, 4], [7, 8]],
        [[9, 10], [13, 14]],
        [[11, 12], [15, 16]],
    ]


def test_a_shuffled_image_by_hand() -> None:
    """Place 0 gets piece 2, place 1 piece 0, place 2 piece 3, place 3 piece 1."""
    shuffled = assemble(permute_pieces(cut_pieces(COUNTING, 2), torch.tensor([[2, 0, 3, 1]])), 2)
    assert shuffled[0, 0].tolist() == [[9, 10, 1, 2], [13, 14, 5, 6], [11, 12, 3, 4], [15, 16, 7, 8]]


def test_every_permutation_of_four_pieces() -> None:
    permutations = torch.tensor(list(itertools.permutations(range(4))))
    images = torch.tensor([[[[10, 11], [12, 13]]]]).expand(24, 1, 2, 2)
    shuffled = assemble(permute_pieces(cut_pieces(images, 2), permutations), 2)
    for image, (a, b, c, d) in zip(shuffled[:, 0].tolist(), permutations.tolist(), strict=True):
        assert image == [[10 + a, 10 + b], [10 + c, 10 + d]]


@pytest.mark.parametrize(("grid", "height", "width"), [(1, 3, 2), (2, 4, 6), (3, 9, 3), (4, 8, 8)])
def test_assembled_pieces_are_the_image(grid: int, height: int, width: int) -> None:
    images = torch.randn(3, 2, height, width)
    pieces = cut_pieces(images, grid)
    assert pieces.shape == (3, grid**2, 2, height // grid, width // grid)
    assert torch.equal(assemble(pieces, grid), images)
    assert torch.equal(assemble(pieces, grid, (height, width)), images)
    for row, column in itertools.product(range(grid), repeat=2):
        h, w = height // grid, width // grid
        expected = images[:, :, row * h : row * h + h, column * w : column * w + w]
        assert torch.equal(pieces[:, row * grid + column], expected)


def test_permuting_is_undone_by_argsort_image_by_image() -> None:
    pieces = torch.randn(5, 9, 3, 2, 2)
    permutations = torch.stack([torch.randperm(9) for _ in range(5)])
    shuffled = permute_pieces(pieces, permutations)
    for n, place in itertools.product(range(5), range(9)):
        assert torch.equal(shuffled[n, place], pieces[n, permutations[n, place]])
    assert torch.equal(permute_pieces(shuffled, permutations.argsort(dim=1)), pieces)


def test_what_is_no_multiple_of_the_grid_is_left_out_at_the_border() -> None:
    """5 x 6 pixels in a 3 x 3 grid: pieces of 1 x 2, without the first and the last row; 4 x 5: the last column too."""
    images = torch.arange(30).view(1, 1, 5, 6)
    pieces = cut_pieces(images, 3)
    assert pieces[0, :, 0, 0].tolist() == [
        [6, 7],
        [8, 9],
        [10, 11],
        [12, 13],
        [14, 15],
        [16, 17],
        [18, 19],
        [20, 21],
        [22, 23],
    ]
    framed = assemble(pieces, 3, (5, 6))[0, 0].tolist()
    assert framed == [[0] * 6, *images[0, 0, 1:4].tolist(), [0] * 6]
    odd = cut_pieces(torch.arange(20).view(1, 1, 4, 5), 2)
    assert odd[0, :, 0].tolist() == [[[0, 1], [5, 6]], [[2, 3], [7, 8]], [[10, 11], [15, 16]], [[12, 13], [17, 18]]]


def test_smaller_pieces_lie_in_the_centre_of_their_cells() -> None:
    pieces = torch.arange(1, 5).view(1, 4, 1, 1, 1)
    assert assemble(pieces, 2, (7, 6))[0, 0].tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 2, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 3, 0, 0, 4, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize(("shape", "grid"), [((1, 1, 2, 4), 3), ((1, 1, 4, 4), 0), ((1, 4, 4), 2)])
def test_images_that_cannot_be_cut(shape: tuple[int, ...], grid: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{grid} x {grid} grid, but got"):
        cut_pieces(torch.zeros(shape), grid)


# ---------------------------------------------------------------------- the gap
def test_crops_are_windows_of_their_pieces_in_every_place() -> None:
    pieces = torch.arange(5 * 7).view(5, 7).expand(60, 4, 2, 5, 7) + 100 * torch.arange(4).view(1, 4, 1, 1, 1)
    crops = crop_pieces(pieces, 2)
    assert crops.shape == (60, 4, 2, 3, 5)
    corners = crops[:, :, :, :1, :1]
    window = 7 * torch.arange(3)[:, None] + torch.arange(5)
    assert torch.equal(crops, corners + window)  # rows and columns side by side, the same in both channels
    offsets = corners[:, :, 0, 0, 0] - 100 * torch.arange(4)
    places, counts = offsets.unique(return_counts=True)
    assert places.tolist() == [7 * row + column for row in range(3) for column in range(3)]
    assert counts.min() > 10  # of 240 / 9
    assert any(len(row.unique()) > 1 for row in offsets)  # each piece has its own


def test_no_gap_changes_nothing() -> None:
    pieces = torch.randn(2, 4, 3, 3, 3)
    assert torch.equal(crop_pieces(pieces, 0), pieces)


# ---------------------------------------------------------------------- the table
def distances(permutations: Tensor) -> Tensor:
    """Between all pairs, without the diagonal: ``[count, count - 1]``."""
    count = len(permutations)
    table = [
        [sum(a != b for a, b in zip(p, q, strict=True)) for q in permutations.tolist()] for p in permutations.tolist()
    ]
    return torch.tensor(table)[~torch.eye(count, dtype=torch.bool)].view(count, -1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_choice_is_the_best_of_all_that_remain(seed: int) -> None:
    chosen = [tuple(row) for row in maximal_hamming_permutations(4, 10, seed).tolist()]
    for i in range(1, 10):

        def score(candidate: tuple[int, ...], i: int = i) -> tuple[int, int]:
            found = [sum(a != b for a, b in zip(candidate, other, strict=True)) for other in chosen[:i]]
            return sum(found), min(found)

        remaining = [p for p in itertools.permutations(range(4)) if p not in chosen[:i]]
        assert chosen[i] in remaining
        assert score(chosen[i]) == max(map(score, remaining))


def test_four_that_differ_everywhere() -> None:
    assert (distances(maximal_hamming_permutations(4, 4)) == 4).all()


def test_all_permutations_once() -> None:
    every = {tuple(row) for row in maximal_hamming_permutations(4, 24).tolist()}
    assert every == set(itertools.permutations(range(4)))


def test_the_papers_size() -> None:
    permutations = maximal_hamming_permutations(9, 100)
    assert permutations.dtype == torch.int64
    assert torch.equal(permutations.sort(dim=1).values, torch.arange(9).expand(100, 9))
    found = distances(permutations)
    assert found.min() >= 4
    assert found.float().mean() > 8.05  # 8 on average between random permutations


def test_seed_and_first() -> None:
    assert torch.equal(maximal_hamming_permutations(4, 6, seed=3), maximal_hamming_permutations(4, 6, seed=3))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert len({maximal_hamming_permutations(4, 6, seed=seed).numpy().tobytes() for seed in range(5)}) > 1
    assert torch.equal(torch.get_rng_state(), state)  # the run's own numbers are not drawn
    ordered = maximal_hamming_permutations(9, 9, first=range(9))
    assert ordered[0].tolist() == list(range(9))
    assert (ordered[1:] != ordered[0]).all()


def test_more_pieces_than_can_be_listed() -> None:
    permutations = maximal_hamming_permutations(16, 20)
    assert torch.equal(permutations.sort(dim=1).values, torch.arange(16).expand(20, 16))
    assert distances(permutations).min() >= 12


@pytest.mark.parametrize(("pieces", "count"), [(3, 7), (4, 0), (0, 1)])
def test_numbers_that_there_are_not(pieces: int, count: int) -> None:
    with pytest.raises(ConfigurationError, match=f"! permutations .* but got {count} of {pieces}"):
        maximal_hamming_permutations(pieces, count)


def test_first_must_be_a_permutation() -> None:
    with pytest.raises(ConfigurationError, match=r"`first` to be a permutation of 0 to 2, but got \[0, 1, 1\]"):
        maximal_hamming_permutations(3, 2, first=(0, 1, 1))
