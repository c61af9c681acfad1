"""The streams against an independent reading of their contract."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from framework.datamodules.datasets import LabelledImages
from framework.datamodules.datasets import whole as whole_batches
from framework.datamodules.decoding import read_image
from framework.datamodules.folders import ImageFiles
from framework.datamodules.streams import Draw, EvaluationShard, SeededDraws, StreamSampler
from framework.datamodules.transforms import training_transform


def stream(size: int, batch_size: int = 4, steps: int = 5, seed: int = 3, rank: int = 0, world: int = 1, at: int = 0):
    return StreamSampler([0] * size, batch_size, steps, seed, rank, world, lambda: at)


def whole(size: int, length: int, seed: int = 3) -> list[int]:
    """The endless stream from the front: one permutation after the other."""
    drawn: list[int] = []
    k = 0
    while len(drawn) < length:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + k)
        drawn += torch.randperm(size, generator=generator).tolist()
        k += 1
    return drawn[:length]


@pytest.mark.parametrize("size", [4, 7, 20, 33])
def test_equals_concatenated_permutations(size: int) -> None:
    served = [int(i) for epoch in range(4) for i in stream(size, at=5 * epoch)]
    assert served == whole(size, 80)


@pytest.mark.parametrize("size", [7, 20])
def test_every_image_once_in_a_pass(size: int) -> None:
    # passes end in the middle of batches and of epochs
    served = [int(i) for epoch in range(7) for i in stream(size, at=5 * epoch)]
    for first in range(0, len(served) - size + 1, size):
        assert sorted(served[first : first + size]) == list(range(size))


def test_passes_and_seeds_differ() -> None:
    served = whole(20, 40)
    assert served[:20] != served[20:]
    assert [int(i) for i in stream(20, seed=3)] != [int(i) for i in stream(20, seed=4)]


def test_numbers_count_the_draws_over_epochs() -> None:
    numbers = [draw.number for epoch in range(3) for draw in stream(7, at=5 * epoch)]
    assert numbers == list(range(60))


@pytest.mark.parametrize("start", range(11))
def test_entering_anywhere_equals_the_uninterrupted_stream(start: int) -> None:
    uninterrupted = [(int(d), d.number) for d in stream(7, steps=20)]
    entered = [(int(d), d.number) for d in stream(7, steps=20 - start, at=start)]
    assert entered == uninterrupted[4 * start :]


def test_counter_is_read_where_an_epoch_starts() -> None:
    counter = 0
    sampler = StreamSampler([0] * 9, 2, 3, 0, 0, 1, lambda: counter)
    first = [int(d) for d in sampler]
    counter = 3
    assert first + [int(d) for d in sampler] == whole(9, 12, seed=0)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batch_of_one_process(world: int) -> None:
    ranks = [list(stream(23, batch_size=4, rank=rank, world=world, at=2)) for rank in range(world)]
    one = list(stream(23, batch_size=4 * world, at=2))
    for batch in range(5):
        joined = [draw for rank in ranks for draw in rank[4 * batch : 4 * batch + 4]]
        expected = one[4 * world * batch : 4 * world * (batch + 1)]
        assert [(int(d), d.number) for d in joined] == [(int(d), d.number) for d in expected]


def test_length_is_full_batches() -> None:
    sampler = stream(7)
    assert len(sampler) == 20 == len(list(sampler))
    loader = DataLoader(SeededDraws(Noise(), 0), batch_size=4, sampler=sampler, drop_last=True)
    assert len(loader) == 5
    assert [len(batch) for batch in loader] == [4] * 5


def test_epochs_of_lightning_change_nothing() -> None:
    sampler = stream(7)
    before = [int(d) for d in sampler]
    sampler.set_epoch(3)
    assert [int(d) for d in sampler] == before


def test_a_draw_is_an_index_and_survives_pickling() -> None:
    draw = pickle.loads(pickle.dumps(Draw(5, 1234567890123)))
    assert (draw, draw.number, type(draw)) == (5, 1234567890123, Draw)
    assert list(range(10))[draw] == 5


class Noise(Dataset[torch.Tensor]):
    """A sample is its index and a random number of each generator that a transform may use."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> torch.Tensor:
        assert type(index) is int
        return torch.tensor([float(index), torch.rand(()).item(), random.random(), np.random.rand()])


@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)]
)
def test_augmentation_depends_on_seed_and_draw_only(workers: int, context: str | None) -> None:
    sampler = stream(7, at=3)
    loader = DataLoader(
        SeededDraws(Noise(), 11),
        batch_size=4,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context=context,
        generator=torch.Generator(),
    )
    torch.manual_seed(workers)  # another state of the run's generators
    samples = torch.cat(list(loader))
    expected = torch.stack([SeededDraws(Noise(), 11)[draw] for draw in stream(7, at=3)])
    assert torch.equal(samples, expected)
    assert len(samples[:, 1:].unique()) == 60  # no two draws share a number
    assert not torch.equal(expected[:, 1:], torch.stack([SeededDraws(Noise(), 12)[d] for d in stream(7, at=3)])[:, 1:])


def test_the_runs_generators_are_left_alone() -> None:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    list(DataLoader(SeededDraws(Noise(), 0), batch_size=4, sampler=stream(7), generator=torch.Generator()))
    assert torch.equal(torch.rand(2), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def test_generators_are_restored_after_an_error() -> None:
    class Broken(Noise):
        def __getitem__(self, index: int) -> torch.Tensor:
            torch.rand(1)
            raise OSError("broken")

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(OSError, match="broken"):
        SeededDraws(Broken(), 0)[Draw(0, 9)]
    assert torch.equal(torch.rand(1), expected)


def test_a_plain_index_is_its_own_draw() -> None:
    samples = SeededDraws(Noise(), 2)
    assert torch.equal(samples[3], samples[3])
    assert torch.equal(samples[3], samples[Draw(3, 3)])
    assert len(samples) == 7


@pytest.mark.parametrize(("size", "world"), [(9, 2), (9, 4), (3, 3), (5, 1)])
def test_evaluation_counts_every_sample_once(size: int, world: int) -> None:
    shards = [EvaluationShard(size, rank, world) for rank in range(world)]
    assert sorted(index for shard in shards for index in shard) == list(range(size))
    assert sum(len(shard) for shard in shards) == size
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


# ---------------------------------------------------------------------- images, whose batches are made as a whole
def pictures(folder: Path, transform: v2.Transform, count: int = 7, **options: Any) -> LabelledImages:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(1)
    paths = [str(folder / f"{i}.png") for i in range(count)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (20, 23, 3)).astype(np.uint8)).save(path)
    return LabelledImages(ImageFiles([folder], paths, list(range(count)), [], [0] * count), transform, **options)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("views", [1, 2])
def test_a_loader_gives_what_the_transform_gives_by_hand(tmp_path: Path, workers: int, views: int) -> None:
    transform = training_transform(12, 16, "random_resized", True, color_jitter=0.5, grayscale=0.2, blur=0.5)
    dataset = pictures(tmp_path, transform, views=views)
    samples = SeededDraws(dataset, 11)
    loader = DataLoader(
        samples, 4, sampler=stream(7, at=3), collate_fn=whole_batches, num_workers=workers, generator=torch.Generator()
    )
    draws = iter(stream(7, at=3))
    for images, labels, domains in loader:
        assert labels.dtype == domains.dtype == torch.int64
        for image, label in zip(images, labels, strict=True):
            draw = next(draws)
            assert label == int(draw)
            torch.manual_seed(samples.seed_of(draw))
            for view in image if views > 1 else [image]:
                assert torch.equal(view, transform(read_image(dataset.files.paths[draw])))
    assert next(draws, None) is None


def test_images_leave_the_runs_generators_alone_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only in the end: another thread may be drawing."""
    transform = training_transform(12, 16, "random_resized", True, color_jitter=1.0, grayscale=0.5, blur=1.0)
    state, looks = torch.get_rng_state(), []
    put_view = type(transform).put_view

    def looked_at(*arguments: Any, **options: Any) -> None:
        looks.append(torch.equal(torch.get_rng_state(), state))
        put_view(*arguments, **options)

    monkeypatch.setattr(type(transform), "put_view", looked_at)
    samples = SeededDraws(pictures(tmp_path, transform), 0)
    list(DataLoader(samples, 4, sampler=stream(7), collate_fn=whole_batches, generator=torch.Generator()))
    assert looks == [True] * 20
    assert torch.equal(torch.get_rng_state(), state)


class Own(v2.Transform):  # type: ignore[misc]
    """A user's transform that draws from every generator there is."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()]).mul(255).byte().view(3, 1, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_of_the_users_own_is_as_reproducible(tmp_path: Path, workers: int) -> None:
    samples = SeededDraws(pictures(tmp_path, Own()), 11)
    torch.manual_seed(workers), random.seed(workers), np.random.seed(workers)
    loader = DataLoader(
        samples, 4, sampler=stream(7, at=3), collate_fn=whole_batches, num_workers=workers, generator=torch.Generator()
    )
    images = torch.cat([batch.images for batch in loader])
    assert torch.equal(images, torch.stack([samples[draw].images for draw in stream(7, at=3)]))
    assert len(images.flatten(1).unique(dim=0)) == 20


def test_a_single_sample_is_as_in_a_batch(tmp_path: Path) -> None:
    dataset = pictures(tmp_path, training_transform(12, 16, "pad", True), planned=True)
    images, plans = SeededDraws(dataset, 1)[3].images
    together = SeededDraws(dataset, 1).__getitems__([2, 3]).images
    assert torch.equal(images, together.images[1])
    assert torch.equal(plans, together.plans[1])
