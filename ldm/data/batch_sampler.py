"""Which sample comes when: a pure function of (seed, epoch, position), whatever the ranks and workers."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ldm import rng


@dataclass(frozen=True, slots=True)
class SampleKey:
    """One use of one sample."""

    index: int  # in the data set
    epoch: int
    position: int  # in the step's global batch


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int, stream: str = "order") -> Tensor:
    """The order of `size` samples in one epoch, (size,) int64; of files with `stream` "files"."""
    return torch.randperm(size, generator=rng.generator(seed, stream, epoch))


@lru_cache(maxsize=64)
def row_order(size: int, seed: int, epoch: int, file: int) -> Tensor:
    """The order in which an epoch takes the rows of a file, (size,) int64."""
    return torch.randperm(size, generator=rng.generator(seed, "rows", epoch, file))


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of the numbers below `total`, or all of them if there are no more."""
    return [i * total // min(count, total) for i in range(min(count, total))]


def fitting_batch_size(images: int) -> int:
    """The largest power of two that is not above the number of images, which ranks and micro-batches can divide."""
    return 1 << (images.bit_length() - 1)


@dataclass(eq=False)
class EpochBatchSampler(Sampler[list[SampleKey]]):
    """The micro-batches of one rank, endless, from optimizer step `start` on.

    Every step takes `batch_size` samples over all ranks. The step is divided into `grad_accum_steps` x `world` equal
    slices; this rank gets slice `rank` of each of the `grad_accum_steps` rounds.
    """

    size: int
    _: KW_ONLY
    seed: int
    batch_size: int
    start: int = 0
    grad_accum_steps: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        slices = self.world * self.grad_accum_steps
        if self.batch_size % slices:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide over {self.world} ranks x grad_accum_steps "
                f"{self.grad_accum_steps}: choose a multiple of {slices}"
            )

    def __iter__(self) -> Iterator[list[SampleKey]]:
        micro = self.batch_size // (self.world * self.grad_accum_steps)
        step = self.start
        while True:
            for accumulated in range(self.grad_accum_steps):
                first = (accumulated * self.world + self.rank) * micro
                yield [self.key_at(step, position) for position in range(first, first + micro)]
            step += 1

    def indices(self, step: int) -> list[int]:
        """The samples of the global batch of a step, counted from 0."""
        return [self.key_at(step, position).index for position in range(self.batch_size)]

    def key_at(self, step: int, position: int) -> SampleKey:
        """The sample at a position of the global batch of a step."""
        epoch, offset = divmod(step * self.batch_size + position, self.size)
        return SampleKey(int(permutation(self.size, self.seed, epoch)[offset]), epoch, position)


class BucketBatchSampler(EpochBatchSampler):
    """A batch sampler whose every step takes samples of one group.

    An epoch has all samples of all groups, and some again in the last step of each group. Which samples meet in a step,
    and which group comes when, is drawn for each epoch.
    """

    def __init__(self, groups: Tensor, **options: int) -> None:
        """`groups`: the group of each sample, (size,) integers from 0; `options`: as of `EpochBatchSampler`."""
        super().__init__(len(groups), **options)
        self.groups = groups
        self.steps = sum(-(-count // self.batch_size) for count in groups.bincount().tolist())  # in an epoch
        self._steps_of_epoch = lru_cache(maxsize=1)(self._draw_steps)

    def key_at(self, step: int, position: int) -> SampleKey:
        epoch, step_of_epoch = divmod(step, self.steps)
        return SampleKey(int(self._steps_of_epoch(epoch)[step_of_epoch, position]), epoch, position)

    def _draw_steps(self, epoch: int) -> Tensor:
        """The samples of each step of an epoch: (steps, batch_size)."""
        order = permutation(self.size, self.seed, epoch)
        groups, steps = self.groups[order], []
        for group in groups.unique():
            members = order[groups == group]
            filled = members[torch.arange(-(-len(members) // self.batch_size) * self.batch_size) % len(members)]
            steps.append(filled.view(-1, self.batch_size))
        all_steps = torch.cat(steps)
        return all_steps[torch.randperm(len(all_steps), generator=rng.generator(self.seed, "groups", epoch))]


class ShardedBatchSampler(EpochBatchSampler):
    """A batch sampler that goes from file to file, so that a set need not be on the disk as a whole.

    An epoch draws an order of all files, and of the rows in each. The concatenated rows are divided into equal streams,
    and each step takes a run of positions from each stream: a rank that has few positions needs few files at a time.
    A stream has each of its rows once in an epoch; its next epoch begins when its own rows are through.
    """

    def __init__(self, rows: Sequence[int], *, streams: int, **options: int) -> None:
        """`rows` of each file; `streams`, or the next smaller number that divides the batch."""
        super().__init__(sum(rows), **options)
        self.rows, self.starts = rows, [0, *accumulate(rows)]
        self.streams = next(n for n in range(min(streams, self.size), 0, -1) if self.batch_size % n == 0)
        self._files_of_epoch = lru_cache(maxsize=2)(self._draw_files)  # streams are at most one epoch apart

    def key_at(self, step: int, position: int) -> SampleKey:
        run = self.batch_size // self.streams  # positions of a stream in a step
        stream, row = position // run, step * run + position % run
        first, end = (self.size * n // self.streams for n in (stream, stream + 1))
        epoch, offset = divmod(row, end - first)
        return SampleKey(self._sample_in_epoch(epoch, first + offset), epoch, position)

    def _sample_in_epoch(self, epoch: int, row: int) -> int:
        """The sample at a row of the concatenated files of an epoch."""
        files, ends = self._files_of_epoch(epoch)
        position = bisect_right(ends, row)
        file = files[position]
        return self.starts[file] + int(row_order(self.rows[file], self.seed, epoch, file)[row - ends[position]])

    def _draw_files(self, epoch: int) -> tuple[list[int], list[int]]:
        """The files of an epoch, in order, and the row after the last one of each."""
        files = permutation(len(self.rows), self.seed, epoch, "files").tolist()
        return files, list(accumulate(self.rows[file] for file in files))


def make_batch_sampler(size: int, groups: Tensor | None, **options: int) -> EpochBatchSampler:
    """The batch sampler of `size` samples, whose steps are of one group where the samples have groups."""
    return EpochBatchSampler(size, **options) if groups is None else BucketBatchSampler(groups, **options)
