"""Samplers and the seeded dataset that make any batch of a run reproducible on its own.

Training data are endless streams cut into epochs of full batches. Nothing depends on how a position was reached, so a
run that stops anywhere and resumes sees the batches, and the augmentations, of the uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from framework.datamodules.datasets import Images, first, seeded


class Draw(int):
    """The index of a sample, with the number of its draw in the stream.

    Attributes:
        number: how many samples the stream served before this one, over all ranks.
    """

    number: int

    def __new__(cls, index: int, number: int) -> Draw:
        draw = super().__new__(cls, index)
        draw.number = number
        return draw

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int]]:  # on the way to a worker process
        return Draw, (int(self), self.number)


class StreamSampler(DistributedSampler[Any]):
    """One endless stream of permutations of each of ``S`` domains, served as epochs of ``steps`` full batches.

    Draw ``n`` of the stream is of domain ``n % S``, where it is draw ``n // S`` of that domain's own stream, one
    permutation of its images after the other. So image ``i`` of every batch is of domain ``i % S``, and each domain has
    the same share of it, however many images it holds. One domain is the case ``S = 1``.

    The position is the run's batch counter and permutation ``k`` of a domain is a function of ``(seed, domain, k)``.
    Rank ``r`` takes slice ``r`` of each global batch, so what a step draws does not depend on the number of ranks. An
    epoch starts at the counter, wherever that is, and may be left before its end: in mid-epoch after a resume, or where
    ``limit_train_batches`` is a fraction. It is a ``DistributedSampler`` only so that Lightning leaves it alone.

    Args:
        domains: the domain of each image of the dataset, from 0 to ``S - 1``; none is empty.
        batch_size: images per step and rank, a multiple of ``S``.
        steps: batches in an epoch.
        seed: seed of the order.
        rank, world_size: this process and the number of processes.
        counter: returns the number of batches already processed.
    """

    def __init__(
        self,
        domains: Sequence[int],
        batch_size: int,
        steps: int,
        seed: int,
        rank: int,
        world_size: int,
        counter: Callable[[], int],
    ) -> None:
        self.members: list[list[int]] = [[] for _ in range(max(domains) + 1)]
        for index, domain in enumerate(domains):
            self.members[domain].append(index)
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.rank, self.world_size, self.counter = rank, world_size, counter

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: Lightning's epoch can be one off after a resume, the batch counter never is."""

    def _permutation(self, domain: int, k: int) -> list[int]:
        members = self.members[domain]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + k * len(self.members) + domain)
        return [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]

    def __iter__(self) -> Iterator[Draw]:
        first = self.counter()
        current = [-1] * len(self.members)
        permutations: list[list[int]] = [[]] * len(self.members)
        for batch in range(first, first + self.steps):
            start = (batch * self.world_size + self.rank) * self.batch_size
            for number in range(start, start + self.batch_size):
                drawn, domain = divmod(number, len(self.members))
                k, position = divmod(drawn, len(self.members[domain]))
                if k != current[domain]:
                    current[domain], permutations[domain] = k, self._permutation(domain, k)
                yield Draw(permutations[domain][position], number)


class SeededDraws(Dataset[Any]):
    """Augments each draw from ``(seed, number of the draw)``: whatever worker, rank or resumed run asks for it.

    Of another dataset than :class:`~framework.datamodules.datasets.Images` each sample is taken with the generators of
    torch, ``random`` and NumPy set to the draw's seed.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.dataset, Images):
            return first(self.__getitems__([index]))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Any:
        """A whole batch."""
        plain, seeds = [int(index) for index in indices], [self.seed_of(index) for index in indices]
        if isinstance(self.dataset, Images):
            return self.dataset.batch(plain, seeds)
        samples = []
        for index, seed in zip(plain, seeds, strict=True):
            with seeded(seed):
                samples.append(self.dataset[index])
        return samples

    def seed_of(self, index: int) -> int:
        """The seed of a draw's random numbers: with it set, calling a transform by hand gives what the loader gives."""
        number = getattr(index, "number", index)  # a plain index comes from Trainer(overfit_batches=...)
        return (self.seed * 2_000_003 + int(number)) % (1 << 63)


class EvaluationShard(DistributedSampler[Any]):
    """Every sample exactly once over all ranks. A stock ``DistributedSampler`` pads, and counts some twice."""

    def __init__(self, size: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: evaluation has one order."""

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
