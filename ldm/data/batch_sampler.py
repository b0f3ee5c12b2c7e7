"""Which sample comes when: a pure function of (seed, epoch, position), whatever the processes and workers."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from ldm import rng


class SampleKey(NamedTuple):
    """Names one use of one sample: `position` is its place in the step's global batch."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    epoch: int
    position: int


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """The order of `size` samples in one epoch."""
    return torch.randperm(size, generator=rng.generator(seed, "order", epoch))


def sample_at_position(place: int, *, size: int, seed: int) -> tuple[int, int]:
    """(index, epoch) of the sample at `place` in the endless stream of shuffled epochs."""
    epoch, offset = divmod(place, size)
    return int(permutation(size, seed, epoch)[offset]), epoch


@lru_cache(maxsize=4)
def file_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch goes through `count` files."""
    return torch.randperm(count, generator=rng.generator(seed, "files", epoch)).tolist()


@lru_cache(maxsize=64)
def row_order(size: int, seed: int, epoch: int, file: int) -> Tensor:
    """The order in which an epoch takes the rows of a file."""
    return torch.randperm(size, generator=rng.generator(seed, "rows", epoch, file))


def first_samples(dataset: Dataset[Any], count: int) -> list[Any]:
    """The first `count` samples of a data set, the same at every call: for validation."""
    return [dataset[SampleKey(index, 0, index)] for index in range(min(count, len(dataset)))]  # type: ignore[arg-type]


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of the numbers below `total`, or all of them if there are no more."""
    return [i * total // min(count, total) for i in range(min(count, total))]


def image_batches(
    dataset: Dataset[Any], chosen: Sequence[int] | None = None, *, batch_size: int = 64
) -> Iterator[Tensor]:
    """The images of a data set, all or the `chosen` ones, in batches (b, c, h, w)."""
    for batch in sample_batches(dataset, chosen, batch_size=batch_size):
        yield batch["image"]


def sample_batches(
    dataset: Dataset[Any], chosen: Sequence[int] | None = None, *, batch_size: int = 64
) -> Iterator[Any]:
    """The samples of a data set, all or the `chosen` ones, in collated batches."""
    chosen = range(len(dataset)) if chosen is None else chosen  # type: ignore[arg-type]
    for first in range(0, len(chosen), batch_size):
        yield default_collate([dataset[SampleKey(i, 0, i)] for i in chosen[first : first + batch_size]])


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """The micro-batches of one process, endless, from optimizer step `start` on.

    Every step takes `batch_size` samples over all processes. The step is cut into `accumulate` x `world` equal slices;
    this process gets slice `rank` of each of the `accumulate` rounds.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        batch_size: int,
        start: int = 0,
        grad_accum_steps: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if size < 1:
            raise ValueError("the training set is empty")
        if batch_size % (world * grad_accum_steps):
            raise ValueError(
                f"batch_size {batch_size} does not divide over {world} processes x grad_accum_steps {grad_accum_steps}: "
                f"choose a multiple of {world * grad_accum_steps}"
            )
        self.size, self.seed, self.batch_size, self.start = size, seed, batch_size, start
        self.grad_accum_steps, self.rank, self.world = grad_accum_steps, rank, world

    def __iter__(self) -> Iterator[list[SampleKey]]:
        micro = self.batch_size // (self.world * self.grad_accum_steps)
        step = self.start
        while True:
            for round_ in range(self.grad_accum_steps):
                first = (round_ * self.world + self.rank) * micro
                yield [self._key(step, position) for position in range(first, first + micro)]
            step += 1

    def indices(self, step: int) -> list[int]:
        """The samples of the whole batch of a step, from 0."""
        return [self._key(step, position).index for position in range(self.batch_size)]

    def _key(self, step: int, position: int) -> SampleKey:
        index, epoch = sample_at_position(step * self.batch_size + position, size=self.size, seed=self.seed)
        return SampleKey(index, epoch, position)


class BucketBatchSampler(EpochBatchSampler):
    """An order whose every step takes samples of one group.

    An epoch has all samples of all groups, and, in the last step of each group, some of it again. Which samples come
    together, and which group comes when, is another for each epoch.
    """

    def __init__(self, groups: Tensor, **order: Any) -> None:
        """`groups` holds the number of the group of each sample; the rest is that of `Order`."""
        super().__init__(len(groups), **order)
        self.groups = groups
        self.steps = sum(-(-count // self.batch_size) for count in groups.bincount().tolist())  # in an epoch
        self._drawn: tuple[int, Tensor] = (-1, groups)

    def _key(self, step: int, position: int) -> SampleKey:
        epoch, number = divmod(step, self.steps)
        if self._drawn[0] != epoch:
            self._drawn = epoch, self._batches(epoch)
        return SampleKey(int(self._drawn[1][number, position]), epoch, position)

    def _batches(self, epoch: int) -> Tensor:
        """The samples of each step of an epoch: (steps, batch_size)."""
        order = permutation(self.size, self.seed, epoch)
        groups, batches = self.groups[order], []
        for group in range(int(groups.max()) + 1):
            own = order[groups == group]
            if len(own):
                filled = own[torch.arange(-(-len(own) // self.batch_size) * self.batch_size) % len(own)]
                batches.append(filled.view(-1, self.batch_size))
        every = torch.cat(batches)
        return every[torch.randperm(len(every), generator=rng.generator(self.seed, "groups", epoch))]


def make_batch_sampler(size: int, groups: Tensor | None) -> Callable[..., EpochBatchSampler]:
    """Makes the order of `size` samples, in steps of one group where they have groups."""
    return partial(EpochBatchSampler, size) if groups is None else partial(BucketBatchSampler, groups)


class ShardedBatchSampler(EpochBatchSampler):
    """An order that goes from file to file, so that a set need not lie on the disk as a whole.

    An epoch draws an order of all files, and of the rows in each. That row of rows is cut into equal streams, and
    each step takes a run of positions from each stream: a process that has few positions needs few files at a time.
    A stream has each of its rows once in an epoch; the next one begins when its own rows are through.
    """

    def __init__(self, rows: Sequence[int], *, streams: int, **order: Any) -> None:
        """`rows` of each file; `streams`, or the next smaller number that divides the batch; the rest as in `Order`."""
        super().__init__(sum(rows), **order)
        self.rows, self.starts = rows, [0, *accumulate(rows)]
        self.streams = next(n for n in range(min(streams, self.size), 0, -1) if self.batch_size % n == 0)
        self._drawn: dict[int, tuple[list[int], list[int]]] = {}

    def _key(self, step: int, position: int) -> SampleKey:
        own = self.batch_size // self.streams  # positions of a stream
        stream, place = position // own, step * own + position % own
        first, end = (self.size * n // self.streams for n in (stream, stream + 1))
        epoch, offset = divmod(place, end - first)
        return SampleKey(self._index(epoch, first + offset), epoch, position)

    def _index(self, epoch: int, place: int) -> int:
        """The sample at a place of the whole epoch."""
        if epoch not in self._drawn:  # streams are at most one epoch apart
            files = file_order(len(self.rows), self.seed, epoch)
            ends = list(accumulate(self.rows[file] for file in files))
            self._drawn = {e: drawn for e, drawn in self._drawn.items() if e >= epoch - 1} | {epoch: (files, ends)}
        files, ends = self._drawn[epoch]
        number = bisect_right(ends, place)
        file = files[number]
        row = row_order(self.rows[file], self.seed, epoch, file)[place - ends[number]]  # counted from its end
        return self.starts[file] + int(row)
