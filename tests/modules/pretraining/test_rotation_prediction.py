"""Rotation prediction: which label goes with which rotation, the loss's value, what a preview says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from framework.errors import ConfigurationError
from framework.modules import RotationPrediction
from framework.modules.pretraining.rotation_prediction import RotationTask
from framework.networks import create_backbone


def marked(count: int, size: int = 5) -> Tensor:
    """Images whose brightest pixel is at the top left; turned counter-clockwise it goes to the bottom left and on."""
    images = torch.rand(count, 3, size, size)
    images[:, :, 0, 0] = 10
    return images


def corners(images: Tensor) -> Tensor:
    """An 'encoder' that reads the label off the pixels: top left, bottom left, bottom right, top right."""
    return torch.stack([images[:, 0, y, x] for y, x in ((0, 0), (-1, 0), (-1, -1), (0, -1))], dim=1)


def reading_task(rotations: str) -> RotationTask:
    task = RotationTask(4, rotations)  # type: ignore[arg-type]
    with torch.no_grad():
        task.head.weight.copy_(torch.eye(4))
        task.head.bias.zero_()
    return task


@pytest.mark.parametrize("rotations", ["all", "random"])
def test_who_reads_the_rotation_off_the_pixels_is_always_right(rotations: str) -> None:
    task = reading_task(rotations)
    loss = task(corners, marked(16))
    assert float(task.diagnostics["rotation_accuracy"]) == 1
    assert float(loss) < 1e-3
    with torch.no_grad():
        task.head.weight.copy_(torch.eye(4).roll(1, dims=0))  # one quarter turn too many
    assert float(task(corners, marked(16))) > 5
    assert float(task.diagnostics["rotation_accuracy"]) == 0


def test_all_four_rotations_of_each_image_in_one_batch() -> None:
    seen: list[Tensor] = []

    def encode(images: Tensor) -> Tensor:
        seen.append(images)
        return corners(images)

    images = marked(6)
    RotationTask(4)(encode, images)
    (batch,) = seen  # one pass
    assert batch.shape == (24, 3, 5, 5)
    counts = corners(batch).argmax(dim=1).bincount(minlength=4)
    assert counts.tolist() == [6, 6, 6, 6]
    for n in range(6):
        for turns in range(4):
            turned = torch.rot90(images[n], turns, dims=(1, 2))
            assert sum(torch.equal(turned, row) for row in batch) == 1


def test_random_rotations_are_drawn_anew_and_all_alike_often() -> None:
    drawn: list[Tensor] = []

    def encode(images: Tensor) -> Tensor:
        drawn.append(corners(images).argmax(dim=1))
        return corners(images)

    task, images = RotationTask(4, "random"), marked(300)
    for _ in range(2):
        task(encode, images)
    assert all(50 < count < 100 for row in drawn for count in row.bincount(minlength=4).tolist())
    assert not torch.equal(*drawn)
    torch.manual_seed(7)
    task(encode, images)
    torch.manual_seed(7)
    task(encode, images)
    assert torch.equal(*drawn[2:])


def test_loss_against_a_loop() -> None:
    images = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    weight = torch.randn(5, 48, dtype=torch.float64)
    task = RotationTask(5).double()

    def encode(batch: Tensor) -> Tensor:
        return batch.flatten(1) @ weight.T

    total = 0.0
    for image in images:
        for turns in range(4):
            logits = task.head(encode(torch.rot90(image, turns, dims=(1, 2))[None]))[0].tolist()
            total += math.log(sum(math.exp(value) for value in logits)) - logits[turns]
    assert float(task(encode, images).detach()) == pytest.approx(total / 12)


def test_gradients_reach_backbone_and_head() -> None:
    backbone, task = create_backbone("resnet8"), RotationTask(64)
    task(backbone, torch.randn(4, 3, 16, 16)).backward()
    parameters = [*backbone.parameters(), *task.parameters()]
    assert all(p.grad is not None and p.grad.any() for p in parameters)
    assert not task.diagnostics["rotation_accuracy"].requires_grad


def test_it_learns_which_way_is_up() -> None:
    """Images brighter at the top: a few steps are enough, and it is right on others too."""

    def images() -> Tensor:
        return torch.linspace(1, -1, 8).view(8, 1) + 0.3 * torch.randn(16, 3, 8, 8)

    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16))
    task = RotationTask(16)
    optimizer = torch.optim.SGD([*backbone.parameters(), *task.parameters()], lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        task(backbone, images()).backward()
        optimizer.step()
    task(backbone, images())
    assert float(task.diagnostics["rotation_accuracy"]) > 0.95


def test_in_half_precision_the_loss_is_a_float32() -> None:
    backbone, task, images = create_backbone("resnet8"), RotationTask(64), torch.randn(4, 3, 16, 16)
    exact = task(backbone, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(backbone, images)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.05)


def test_preview() -> None:
    task, images = reading_task("random"), marked(2)
    pictures, captions = task.preview(corners, images)
    assert pictures.shape == (2, 4, 3, 5, 5)
    for n in range(2):
        for turns in range(4):
            assert torch.equal(pictures[n, turns], torch.rot90(images[n], turns, dims=(1, 2)))
    assert captions == [["0°: 0°", "90°: 90°", "180°: 180°", "270°: 270°"]] * 2
    with torch.no_grad():
        task.head.weight.zero_()
        task.head.bias[2] = 1
    assert task.preview(corners, images).captions == [["0°: 180°", "90°: 180°", "180°: 180°", "270°: 180°"]] * 2


def test_mistakes() -> None:
    with pytest.raises(ConfigurationError, match=r"`--model\.rotations` to be 'all' or 'random', but got 'both'"):
        RotationPrediction(backbone="resnet8", rotations="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="square images"):
        RotationTask(4)(corners, torch.zeros(2, 3, 4, 5))
