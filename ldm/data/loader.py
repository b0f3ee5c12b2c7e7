"""Loading: the batches of one rank, each with the keys of its samples."""

import os
import re
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ldm.data.batch import Batch, collate
from ldm.data.batch_sampler import EpochBatchSampler, SampleKey

Batches = Iterator[tuple[list[SampleKey], Batch]]


def load_batches(
    data: Any,
    batch_sampler: EpochBatchSampler,
    *,
    num_workers: int,
    timeout: int,
    pin_memory: bool,
) -> Batches:
    """Endless micro-batches of `data[SampleKey]`, with the keys of their samples.

    `timeout` in seconds is for loading processes.
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
        raise ValueError(
            f"DataLoader worker failed ({reason}); if out of memory lower --num-workers; restart with --resume latest"
        ) from None


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
