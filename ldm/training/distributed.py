"""Ranks: starting accelerate, threads, timeouts, and doing something on rank 0 for all."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, utils

from ldm.training.config import TrainingConfig

PEER_FAILURE = re.compile("timed? ?out|connection (closed|reset)|peer", re.IGNORECASE)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's engine, with the precision and devices of `accelerate launch`."""
    if "wandb" in config.trackers and not utils.is_wandb_available():
        raise ValueError("trackers: wandb is not installed; `pip install wandb` or leave it out")
    folders = utils.ProjectConfiguration(str(config.run), logging_dir=str(config.run / "tensorboard"))
    accelerator = Accelerator(
        log_with=list(config.trackers) or None,
        project_config=folders,
        kwargs_handlers=[process_group_timeout(config.timeout)],
    )
    utils.set_seed(config.seed)  # initial weights; every later draw is keyed
    if accelerator.device.type == "cpu":
        restore_num_threads()
    return accelerator


def process_group_timeout(seconds: int) -> utils.InitProcessGroupKwargs:
    """How long collectives wait, for an `Accelerator`."""
    return utils.InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))


def on_rank0(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Do something on rank 0; its result, or its error, is that of all ranks."""
    result: Any = None
    if accelerator.is_main_process:
        try:
            result = action()
        except Exception as error:
            result = error
    [result] = utils.broadcast_object_list([result])
    if isinstance(result, Exception):
        raise result
    return result


@contextmanager
def peer_errors(accelerator: Accelerator, timeout: int, remedy: str) -> Iterator[None]:
    """Turn a collective that fails since another rank is gone into a ValueError; torch has no exception type for it."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not PEER_FAILURE.search(str(error)):
            raise
        raise ValueError(
            f"a rank failed or timed out ({timeout} s): see the output of the other ranks, then {remedy}"
        ) from None


def has_launcher() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def restore_num_threads() -> None:
    """Share out all cores: launchers that find no GPU give each process one thread."""
    if has_launcher() and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
