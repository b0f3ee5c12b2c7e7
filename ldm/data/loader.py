"""Loading: what a batch is, and the batches of one rank, each with the keys of its samples."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.data.batch_sampler import EpochBatchSampler, SampleKey


class Batch(TypedDict, total=False):
    """What data sets give to a training: each some of these fields. A sample has the same, without the first axis.

    Images come with captions, latents in memory with captions, latents from files with the ids of a caption.
    """

    image: Tensor  # (b, c, height, width) float32 in [-1, 1]
    mean: Tensor  # (b, c, h, w) float32, of the latents' normal distribution, as the VAE gives it
    logvar: Tensor  # (b, c, h, w) float32, its log-variance
    features: Tensor  # (b, c, h, w) float32, of an image tower, cached with latents in memory
    sizes: Tensor  # (b, 6) int64, in pixels: original height and width, crop top and left, height and width
    caption: list[str]  # one caption for each image, "" where it has none
    ids: Tensor  # (b, n) int64, the token ids of a caption
    hidden_states: Tensor  # (b, n, dim) float32, of the text towers for these ids
    pooled: Tensor  # (b, dim) float32, the pooled vector of the text towers


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack the tensors of samples, and list their captions."""
    return default_collate(list(samples))


Batches = Iterator[tuple[list[SampleKey], Batch]]


def sample_batches(
    dataset: Dataset[Any], indices: Sequence[int] | None = None, *, epoch: int = 0, batch_size: int = 64
) -> Iterator[Batch]:
    """The samples of a data set in an epoch, all or those at `indices`, in collated batches."""
    indices = range(len(dataset)) if indices is None else indices  # type: ignore[arg-type]
    for first in range(0, len(indices), batch_size):
        yield collate([dataset[SampleKey(i, epoch, i)] for i in indices[first : first + batch_size]])


def load_batches(
    data: Any, batch_sampler: EpochBatchSampler, *, num_workers: int, timeout: int, pin_memory: bool
) -> Batches:
    """Endless micro-batches of `data[SampleKey]`, with the keys of their samples; `timeout`, in seconds, is of workers.

    ValueError of a data set comes in one line, also from a loading process; one that dies is a ValueError, too.
    """
    loader = DataLoader(
        KeyedBatches(data),
        batch_sampler=batch_sampler,
        collate_fn=tuple,  # which leaves a batch as it is
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_detach_worker_signals,
        timeout=timeout if num_workers else 0,
        pin_memory=pin_memory,
    )
    return _with_short_errors(iter(loader))


def _with_short_errors(batches: Batches) -> Batches:
    try:
        yield from batches
    except ValueError as error:  # torch wraps that of a loading process in a traceback
        last = str(error).strip().splitlines()[-1]
        raise ValueError(re.sub(rf"^[\w.]*{type(error).__name__}: ", "", last)) from None
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        remedy = "if out of memory lower --num-workers; restart with --resume latest"
        raise ValueError(f"DataLoader worker failed ({reason}); {remedy}") from None


class KeyedBatches(Dataset[Any]):
    """Hands each batch on together with its keys; data that can prefetch is given these first."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitems__(self, keys: list[SampleKey]) -> tuple[list[SampleKey], Batch]:
        if prefetch := getattr(self.data, "prefetch", None):
            prefetch(keys)
        return keys, collate([self.data[key] for key in keys])


def _detach_worker_signals(worker: int) -> None:
    """Spare a loading process the signals to the group of a run, which answers them itself and needs it until then."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
