"""Jigsaw puzzles: in which order do the pieces of an image belong?

Noroozi & Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", ECCV 2016,
arXiv:1603.09246; with the pieces put together to one shuffled image, Carlucci et al., "Domain Generalization by Solving
Jigsaw Puzzles" (JiGen), CVPR 2019, arXiv:1903.06864.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.errors import ConfigurationError, at_least_zero
from framework.functional import assemble, crop_pieces, cut_pieces, maximal_hamming_permutations, permute_pieces
from framework.modules.pretraining.base import Encoder, PretextTask, PretrainingModule, Preview
from framework.networks.heads import MLPHead

Arrangement = Literal["image", "pieces"]
LARGEST_GRID = 10
PIECE_FEATURES, HIDDEN_FEATURES = 512, 1024  # of the head for single pieces


class JigsawTask(PretextTask):
    """Cross-entropy of a head that tells which of some permutations the pieces of an image have undergone.

    The permutations are those of :func:`~framework.functional.maximal_hamming_permutations` with the image in order as
    the first one, so that all are far from it too: a constant in the state dict. Each image gets one at random, drawn
    anew each time.

    ``arrangement: image`` (Carlucci 2019): the pieces in their new order make up an image as large as the original one,
    which the backbone sees as any other, and the head is linear. It suits every backbone, and a classifier beside it.
    Where the sides are no multiple of the grid, or the pieces have a ``gap``, zeros (the mean colour) fill the rest.

    ``arrangement: pieces`` (Noroozi 2016): the backbone sees one small piece at a time, so that it cannot use what is
    on both sides of an edge; a layer on the features of each piece and one on those of all of them lead to the
    permutation. It is for backbones that take images of any size, not for transformers of one size.

    Diagnostics: ``jigsaw_accuracy``, one over the number of classes by guessing.

    Args:
        num_features: width ``C`` of the backbone's features.
        grid: pieces in a row and in a column, 2 to 10.
        permutations: how many shuffled orders: 30 in JiGen's code, 100 in Noroozi's.
        arrangement: ``image`` or ``pieces``.
        ordered: the image in order is one more class, drawn as often as each of the others (JiGen).
        gap: pixels by which each piece is shorter, in a random place, so that edges do not continue in the neighbour; 0
            for none. Noroozi 2016 cuts 64 of 75 pixels.
        normalize_pieces: bring each piece to mean 0 and standard deviation 1, so that brightness and contrast do not
            tell neighbours (Noroozi 2016).
    """

    permutations: Tensor

    changes_images: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        grid: int = 3,
        permutations: int = 30,
        arrangement: Arrangement = "image",
        ordered: bool = True,
        gap: int = 0,
        normalize_pieces: bool = False,
    ) -> None:
        super().__init__()
        _check(grid, permutations, arrangement, ordered, gap)
        self.grid, self.arrangement, self.gap, self.normalize_pieces = grid, arrangement, gap, normalize_pieces
        self.first = 0 if ordered else 1
        pieces = grid**2
        table = maximal_hamming_permutations(pieces, permutations + 1, first=range(pieces))
        self.register_buffer("permutations", table[self.first :])  # [K, pieces]
        classes = len(self.permutations)
        if arrangement == "image":
            self.head: nn.Module = nn.Linear(num_features, classes)
        else:
            self.piece_layer = nn.Sequential(nn.Linear(num_features, PIECE_FEATURES), nn.ReLU())
            self.head = MLPHead(pieces * PIECE_FEATURES, classes, HIDDEN_FEATURES, dropout=0.0)

    def forward(self, encode: Encoder, images: Tensor) -> Tensor:
        """Mean cross-entropy over the shuffled images, a scalar."""
        labels = torch.randint(len(self.permutations), (len(images),), device=images.device)
        logits = self._logits(encode, self._shuffled(images, labels), images)
        self.diagnostics = {"jigsaw_accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}
        return F.cross_entropy(logits, labels)

    def _shuffled(self, images: Tensor, labels: Tensor) -> Tensor:
        pieces = cut_pieces(images, self.grid)
        if self.gap:
            if self.gap >= min(pieces.shape[3:]):
                raise ConfigurationError(
                    f"Expected `--model.gap` to be below the {min(pieces.shape[3:])} pixels of a piece, but got "
                    f"{self.gap}."
                )
            pieces = crop_pieces(pieces, self.gap)
        if self.normalize_pieces:
            pieces = F.layer_norm(pieces, pieces.shape[2:])
        return permute_pieces(pieces, self.permutations[labels])  # [N, pieces, C, h, w]

    def _logits(self, encode: Encoder, pieces: Tensor, images: Tensor) -> Tensor:
        if self.arrangement == "image":
            features = encode(self._put_together(pieces, images))
        else:
            features = self.piece_layer(_of_single_pieces(encode, pieces)).flatten(1)
        logits: Tensor = self.head(features)
        return logits

    def _put_together(self, pieces: Tensor, images: Tensor) -> Tensor:
        return assemble(pieces, self.grid, images.shape[2:])

    def preview(self, encode: Encoder, images: Tensor) -> Preview:
        """Each image shuffled, and put together by the predicted permutation; image ``i`` by the ``i``-th one."""
        shuffles = len(self.permutations) - 1 + self.first  # without the image in order
        labels = torch.arange(len(images), device=images.device) % shuffles + 1 - self.first
        shuffled = self._shuffled(images, labels)
        predicted = self._logits(encode, shuffled, images).argmax(dim=1)
        restored = permute_pieces(shuffled, self.permutations[predicted].argsort(dim=1))
        pictures = torch.stack([self._put_together(pieces, images) for pieces in (shuffled, restored)], dim=1)
        pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
        return Preview(
            pictures, [[f"{label}: {guess}", "right" if label == guess else "wrong"] for label, guess in pairs]
        )


class JigsawPrediction(PretrainingModule):
    """Pre-training by solving jigsaw puzzles (Noroozi & Favaro, ECCV 2016; Carlucci et al., CVPR 2019).

    Of use where objects have parts with a place of their own; blind in textures, whose pieces fit anywhere.

    Args:
        grid: pieces in a row and in a column, 2 to 10.
        permutations: how many shuffled orders there are, far from each other.
        arrangement: the backbone sees the shuffled ``image`` (Carlucci 2019), or its ``pieces`` one at a time (Noroozi
            2016), which not every backbone takes.
        ordered: the image in order is one more class.
        gap: pixels by which each piece is shorter, in a random place.
        normalize_pieces: bring each piece to mean 0 and standard deviation 1.
        options: those of :class:`~framework.modules.pretraining.PretrainingModule`.
    """

    def __init__(
        self,
        *,
        grid: int = 3,
        permutations: int = 30,
        arrangement: Arrangement = "image",
        ordered: bool = True,
        gap: int = 0,
        normalize_pieces: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.task = JigsawTask(self.num_features, grid, permutations, arrangement, ordered, gap, normalize_pieces)


def _of_single_pieces(encode: Encoder, pieces: Tensor) -> Tensor:
    try:
        return encode(pieces.flatten(0, 1)).view(*pieces.shape[:2], -1)  # [N, pieces, C]
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:  # networks refuse sizes in many ways
        reason = (str(error).splitlines() or [""])[0].rstrip(".!") or type(error).__name__
        raise ConfigurationError(
            f"Expected `--model.backbone` to take single pieces of {pieces.shape[3]} x {pieces.shape[4]} pixels, but "
            f"it failed: {reason}. If that is their size, use `--model.arrangement image`, fewer pieces "
            "(`--model.grid`) or larger images (`--data.image_size`)."
        ) from error


def _check(grid: int, permutations: int, arrangement: str, ordered: bool, gap: int) -> None:
    if not 2 <= grid <= LARGEST_GRID:
        raise ConfigurationError(f"Expected `--model.grid` to be between 2 and {LARGEST_GRID}, but got {grid}.")
    pieces, least = grid**2, 1 if ordered else 2  # two classes at least
    if not least <= permutations < math.factorial(pieces):
        raise ConfigurationError(
            f"Expected `--model.permutations` to be at least {least} and below {pieces}!, the number of orders of "
            f"{pieces} pieces, but got {permutations}."
        )
    if arrangement not in get_args(Arrangement):
        raise ConfigurationError(f"Expected `--model.arrangement` to be 'image' or 'pieces', but got {arrangement!r}.")
    at_least_zero("--model.gap", gap)
