"""Jigsaw puzzles: which label goes with which order of the pieces, for a shuffled image and for single pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.functional import assemble, cut_pieces, maximal_hamming_permutations, permute_pieces
from framework.modules import JigsawPrediction
from framework.modules.pretraining.jigsaw_prediction import JigsawTask
from framework.networks import create_backbone


def numbered(count: int, grid: int = 2, size: int = 4) -> Tensor:
    """Images whose piece ``p`` has the value ``p`` everywhere."""
    pieces = torch.arange(float(grid**2)).view(1, -1, 1, 1, 1).expand(count, -1, 3, size, size)
    return assemble(pieces, grid)


class Reader(nn.Module):
    """A 'head' that finds the row of the table that says which piece is in which place."""

    def __init__(self, task: JigsawTask, shift: int = 0) -> None:
        super().__init__()
        self.table, self.shift = task.permutations, shift

    def forward(self, orders: Tensor) -> Tensor:
        right = (orders[:, None] == self.table).all(dim=2)
        assert (right.sum(dim=1) == 1).all()  # of the table, and once in it
        return 50 * right.float().roll(self.shift, dims=1)


def reading(
    arrangement: str = "image", shift: int = 0, **options: Any
) -> tuple[JigsawTask, Callable[[Tensor], Tensor]]:
    """A task that reads the label off numbered images, and the encoder for it."""
    options = {"grid": 2, "permutations": 7, **options}
    task = JigsawTask(4, arrangement=arrangement, **options)  # type: ignore[arg-type]
    task.head = Reader(task, shift)
    grid = options["grid"]

    def of_image(images: Tensor) -> Tensor:
        return cut_pieces(images, grid).mean(dim=(2, 3, 4)).round()

    def of_pieces(pieces: Tensor) -> Tensor:
        return pieces.mean(dim=(1, 2, 3))[:, None].round()

    if arrangement == "image":
        return task, of_image
    task.piece_layer = nn.Identity()  # type: ignore[assignment]
    return task, of_pieces


# ---------------------------------------------------------------------- the table
def test_the_table_begins_with_the_image_in_order() -> None:
    with_order, without = JigsawTask(8, 2, 7), JigsawTask(8, 2, 7, ordered=False)
    assert with_order.permutations.shape == (8, 4)
    assert with_order.permutations[0].tolist() == [0, 1, 2, 3]
    assert torch.equal(without.permutations, with_order.permutations[1:])
    assert [0, 1, 2, 3] not in without.permutations.tolist()
    assert torch.equal(with_order.permutations, maximal_hamming_permutations(4, 8, first=range(4)))
    assert with_order.head.out_features == 8
    assert without.head.out_features == 7
    assert len(JigsawTask(8).permutations) == 31  # 30 of 9 pieces, and in order


def test_the_table_is_a_constant_in_the_state_dict() -> None:
    torch.manual_seed(1)
    first = JigsawTask(8, 2, 7)
    torch.manual_seed(2)
    second = JigsawTask(8, 2, 7)
    assert torch.equal(first.permutations, second.permutations)
    state = first.state_dict()
    assert torch.equal(state["permutations"], first.permutations)
    state["permutations"] = first.permutations.flip(0)
    second.load_state_dict(state)
    assert torch.equal(second.permutations, first.permutations.flip(0))


# ---------------------------------------------------------------------- labels
@pytest.mark.parametrize("arrangement", ["image", "pieces"])
@pytest.mark.parametrize("ordered", [True, False])
def test_who_reads_the_order_off_the_pieces_is_always_right(arrangement: str, ordered: bool) -> None:
    task, encode = reading(arrangement, ordered=ordered)
    assert float(task(encode, numbered(64))) < 1e-6
    assert float(task.diagnostics["jigsaw_accuracy"]) == 1
    task, encode = reading(arrangement, shift=1, ordered=ordered)
    assert float(task(encode, numbered(64))) > 40
    assert float(task.diagnostics["jigsaw_accuracy"]) == 0


@pytest.mark.parametrize("arrangement", ["image", "pieces"])
def test_with_a_gap_and_nine_pieces_too(arrangement: str) -> None:
    task, encode = reading(arrangement, grid=3, permutations=30, gap=1)
    images = numbered(64, grid=3, size=5)
    if arrangement == "image":  # the pieces are smaller than their cells: read the middle

        def encode(images: Tensor) -> Tensor:
            return images[:, 0, 2::5, 2::5].flatten(1)

    task(encode, images)
    assert float(task.diagnostics["jigsaw_accuracy"]) == 1


def test_every_order_is_alike_frequent_and_drawn_anew_for_each_image() -> None:
    drawn: list[Tensor] = []

    class Recorder(Reader):
        def forward(self, orders: Tensor) -> Tensor:
            logits = super().forward(orders)
            drawn.append(logits.argmax(dim=1))
            return logits

    task, encode = reading()
    task.head = Recorder(task)
    for _ in range(2):
        task(encode, numbered(800))
    assert all(60 < count < 140 for row in drawn for count in row.bincount(minlength=8).tolist())
    assert not torch.equal(*drawn)
    for _ in range(2):
        torch.manual_seed(7)
        task(encode, numbered(800))
    assert torch.equal(*drawn[2:])


# ---------------------------------------------------------------------- what the backbone sees
def test_a_shuffled_image_is_as_large_as_the_image() -> None:
    """Of 11 x 11 pixels in a 3 x 3 grid 9 x 9 are cut, and lie in a frame of zeros."""
    seen: list[Tensor] = []

    def encode(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1)[:, :8]

    images = torch.rand(6, 3, 11, 11) + 1
    JigsawTask(8)(encode, images)
    (shuffled,) = seen
    assert shuffled.shape == images.shape
    centre = shuffled[:, :, 1:-1, 1:-1]
    assert (shuffled != 0).sum() == (centre != 0).sum() == centre.numel()
    assert not torch.equal(shuffled, images)
    assert torch.equal(centre.flatten(1).sort().values, images[:, :, 1:-1, 1:-1].flatten(1).sort().values)


def test_single_pieces_go_through_the_backbone_in_one_pass() -> None:
    seen: list[Tensor] = []

    def encode(pieces: Tensor) -> Tensor:
        seen.append(pieces)
        return pieces.flatten(1)[:, :8]

    images = torch.rand(5, 3, 12, 12)
    JigsawTask(8, arrangement="pieces", gap=1)(encode, images)
    (pieces,) = seen
    assert pieces.shape == (45, 3, 3, 3)


def test_normalized_pieces() -> None:
    seen: list[Tensor] = []

    def encode(pieces: Tensor) -> Tensor:
        seen.append(pieces)
        return pieces.flatten(1)[:, :8]

    images = 3 * torch.randn(5, 3, 12, 12) + torch.linspace(-5, 5, 12)
    JigsawTask(8, 2, 7, arrangement="pieces", normalize_pieces=True)(encode, images)
    flat = seen[0].flatten(1)
    torch.testing.assert_close(flat.mean(dim=1), torch.zeros(20), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(dim=1, correction=0), torch.ones(20), atol=1e-3, rtol=0)
    plain = permute_pieces(cut_pieces(images, 2), torch.arange(4).expand(5, 4)).flatten(0, 1).flatten(1)
    expected = (plain - plain.mean(dim=1, keepdim=True)) / plain.std(dim=1, correction=0, keepdim=True)
    assert all((expected - row).abs().amax(dim=1).min() < 1e-3 for row in flat)  # each is one of the pieces


# ---------------------------------------------------------------------- the loss
@pytest.mark.parametrize("arrangement", ["image", "pieces"])
def test_loss_against_a_loop(arrangement: str) -> None:
    images = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    task = JigsawTask(6, 2, 7, arrangement=arrangement).double()  # type: ignore[arg-type]
    weight = torch.randn(6, 48 if arrangement == "image" else 12, dtype=torch.float64)

    def encode(batch: Tensor) -> Tensor:
        return batch.flatten(1) @ weight.T

    torch.manual_seed(3)
    labels = torch.randint(8, (4,)).tolist()
    total = 0.0
    for image, label in zip(images, labels, strict=True):
        cells = [image[:, y : y + 2, x : x + 2] for y in (0, 2) for x in (0, 2)]
        a, b, c, d = (cells[piece] for piece in task.permutations[label].tolist())
        if arrangement == "image":
            features = encode(torch.cat([torch.cat([a, b], dim=2), torch.cat([c, d], dim=2)], dim=1)[None])[0]
        else:
            features = torch.cat([task.piece_layer(encode(piece[None]))[0] for piece in (a, b, c, d)])
        logits = task.head(features[None])[0].tolist()
        total += math.log(sum(math.exp(value) for value in logits)) - logits[label]
    torch.manual_seed(3)
    assert float(task(encode, images).detach()) == pytest.approx(total / 4)


@pytest.mark.parametrize("arrangement", ["image", "pieces"])
def test_gradients_reach_backbone_and_head(arrangement: str) -> None:
    backbone = create_backbone("resnet8")
    task = JigsawTask(64, 2, 7, arrangement=arrangement)  # type: ignore[arg-type]
    task(backbone, torch.randn(4, 3, 16, 16)).backward()
    parameters = [*backbone.parameters(), *task.parameters()]
    assert all(p.grad is not None and p.grad.any() for p in parameters)
    assert not task.diagnostics["jigsaw_accuracy"].requires_grad


@pytest.mark.parametrize("arrangement", ["image", "pieces"])
def test_it_learns_where_the_pieces_belong(arrangement: str) -> None:
    means = torch.randn(1, 3, 8, 8)  # what all images share

    def images() -> Tensor:
        return means + 0.3 * torch.randn(32, 3, 8, 8)

    side = 8 if arrangement == "image" else 4
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 32), nn.ReLU())
    task = JigsawTask(32, 2, 7, arrangement=arrangement)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([*backbone.parameters(), *task.parameters()], lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        task(backbone, images()).backward()
        optimizer.step()
    task(backbone, images())
    assert float(task.diagnostics["jigsaw_accuracy"]) > 0.9


@pytest.mark.parametrize("arrangement", ["image", "pieces"])
def test_in_half_precision_the_loss_is_a_float32(arrangement: str) -> None:
    backbone, images = create_backbone("resnet8"), torch.randn(4, 3, 16, 16)
    task = JigsawTask(64, 2, 7, arrangement=arrangement)  # type: ignore[arg-type]
    torch.manual_seed(0)
    exact = task(backbone, images)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(backbone, images)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.05)


# ---------------------------------------------------------------------- preview
@pytest.mark.parametrize("ordered", [True, False])
def test_preview_puts_the_image_together_by_the_predicted_order(ordered: bool) -> None:
    images = numbered(3) + torch.rand(3, 1, 1, 1) / 3
    task, encode = reading(ordered=ordered)
    pictures, captions = task.preview(encode, images)
    assert pictures.shape == (3, 2, 3, 8, 8)
    assert torch.equal(pictures[:, 1], images)  # the reader is right
    first = 1 if ordered else 0
    assert captions == [[f"{first + n}: {first + n}", "right"] for n in range(3)]
    orders = task.permutations[first : first + 3]
    assert torch.equal(pictures[:, 0], assemble(permute_pieces(cut_pieces(images, 2), orders), 2))
    assert all(not torch.equal(*row) for row in pictures)  # none is shown in order

    task, encode = reading(ordered=ordered, shift=1)
    pictures, captions = task.preview(encode, images)
    assert captions == [[f"{first + n}: {first + n + 1}", "wrong"] for n in range(3)]
    assert not any(torch.equal(picture, image) for picture, image in zip(pictures[:, 1], images, strict=True))
    undone = task.permutations[first + 1 : first + 4].argsort(dim=1)
    assert torch.equal(pictures[:, 1], assemble(permute_pieces(cut_pieces(pictures[:, 0], 2), undone), 2))


def test_preview_of_many_images_and_single_pieces() -> None:
    task, encode = reading("pieces", permutations=3)
    pictures, captions = task.preview(encode, numbered(5))
    assert pictures.shape == (5, 2, 3, 8, 8)
    assert [row[0] for row in captions] == ["1: 1", "2: 2", "3: 3", "1: 1", "2: 2"]


# ---------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 1}, r"`--model\.grid` to be between 2 and 10, but got 1"),
        ({"grid": 11}, r"`--model\.grid`"),
        ({"grid": 2, "permutations": 24}, r"`--model\.permutations` to be at least 1 and below 4!, .* but got 24"),
        ({"permutations": 0}, r"`--model\.permutations`"),
        ({"permutations": 1, "ordered": False}, r"`--model\.permutations` to be at least 2"),
        ({"arrangement": "row"}, r"`--model\.arrangement` to be 'image' or 'pieces', but got 'row'"),
        ({"gap": -1}, r"`--model\.gap` to be 0 or more, but got -1"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        JigsawPrediction(backbone="resnet8", **options)


def test_a_gap_that_leaves_nothing() -> None:
    with pytest.raises(ConfigurationError, match=r"`--model\.gap` to be below the 4 pixels of a piece, but got 4"):
        JigsawTask(8, 2, 7, gap=4)(lambda images: images.flatten(1)[:, :8], torch.zeros(2, 3, 8, 9))


def test_a_backbone_of_one_size_takes_no_pieces() -> None:
    network = {"backbone": "timm/vit_tiny_patch16_224"}
    network |= {"backbone_options": {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1}}  # type: ignore[dict-item]
    module = JigsawPrediction(grid=2, permutations=7, arrangement="pieces", **network)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"single pieces of 8 x 8 pixels, but it failed: .*arrangement image"):
        module.task(module.backbone, torch.zeros(2, 3, 16, 16))
    whole = JigsawPrediction(**network)  # type: ignore[arg-type]  # 15 of 16 pixels, in a frame
    assert torch.isfinite(whole.task(whole.backbone, torch.zeros(2, 3, 16, 16)))


def test_memory_that_runs_out_is_said_as_it_is() -> None:
    def encode(pieces: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        JigsawTask(8, 2, 7, arrangement="pieces")(encode, torch.zeros(2, 3, 8, 8))
