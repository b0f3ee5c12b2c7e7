"""TODO."""

import os
import re
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    is_wandb_available,
    set_seed,
)

from ldm.training.config import TrainingConfig

PEER_FAILURE = re.compile("timed? ?out|connection (closed|reset)|peer", re.IGNORECASE)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's engine, with precision and devices as `accelerate launch` was told."""
    if "wandb" in config.trackers and not is_wandb_available():
        raise ValueError("trackers: wandb is not installed; `pip install wandb` or leave it out")
    folders = ProjectConfiguration(str(config.run), logging_dir=str(config.run / "tensorboard"))
    accelerator = Accelerator(
        log_with=list(config.trackers) or None,
        project_config=folders,
        kwargs_handlers=[process_group_timeout(config.timeout)],
    )
    set_seed(config.seed)  # initial weights; every later draw is keyed
    if accelerator.device.type == "cpu":
        _restore_num_threads()
    return accelerator


def process_group_timeout(seconds: int) -> InitProcessGroupKwargs:
    """How long processes wait for each other, as accelerate wants to be told."""
    return InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))


def make_gather(accelerator: Accelerator) -> Callable[[list[int]], list[int]]:
    """A function that joins the lists of all processes."""
    return lambda own: gather_object(own) if accelerator.num_processes > 1 else own


def is_peer_failure(accelerator: Accelerator, error: RuntimeError) -> bool:
    """Whether a collective operation failed since another process is gone; torch has no type for that."""
    return accelerator.num_processes > 1 and PEER_FAILURE.search(str(error)) is not None


def _has_launcher() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _restore_num_threads() -> None:
    """Undo the one thread a process that launchers set where they find no GPU: share out all cores."""
    if _has_launcher() and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
