"""TODO."""

import os
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ldm.data import ImageTextDataset
from ldm.data.batch_sampler import EpochBatchSampler, SampleKey
from ldm.training.config import TrainingConfig
from ldm.training.stage import Batch, Stage

Batches = Iterator[tuple[list[SampleKey], Batch]]


def batch_sampler_for_rank(
    config: TrainingConfig, accelerator: Accelerator, stage: Stage, *, start: int
) -> EpochBatchSampler:
    """Which samples this process takes from step `start` on."""
    cut = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "start": start,
        "grad_accum_steps": config.grad_accum_steps,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
    }
    return stage.make_batch_sampler(**cut)


def make_loader(config: TrainingConfig, accelerator: Accelerator, stage: Stage, order: EpochBatchSampler) -> Batches:
    """The micro-batches of this process with the keys of their samples, loaded as the configuration says."""
    loader = DataLoader(
        IndexedDataset(stage.data),
        batch_sampler=order,
        collate_fn=KeyedCollate(stage.collate),
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        worker_init_fn=_detach_worker_signals,
        timeout=config.timeout if config.num_workers else 0,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)


def _detach_worker_signals(worker: int) -> None:
    """Spare a loading process the signals to the group of a run, which answers them itself and needs it until then."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class IndexedDataset(Dataset[tuple[SampleKey, Any]]):
    """Hands each sample on together with its key."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __getitems__(self, keys: list[SampleKey]) -> list[tuple[SampleKey, Any]]:
        if isinstance(self.data, ImageTextDataset):
            self.data.prefetch(keys)
        return [(key, self.data[key]) for key in keys]


class KeyedCollate:
    """Collates samples and keeps their keys."""

    def __init__(self, collate: Callable[[list[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, samples: list[tuple[SampleKey, Any]]) -> tuple[list[SampleKey], Batch]:
        return [key for key, _ in samples], self.collate([sample for _, sample in samples])


def _next_batch(batches: Batches) -> tuple[list[SampleKey], Batch]:
    """The next micro-batch; an error of a loading process comes without the traceback that torch wraps it in."""
    try:
        return next(batches)
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"loading data failed ({reason}): is there memory enough for --num-workers? go on with --resume latest"
        ) from None
