"""Ranks: finding and connecting them, threads, timeouts, and doing something on rank 0 for all."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, utils

from ldm.precision import allow_tf32
from ldm.ranks import ONE_RANK, Ranks
from ldm.training.config import TrainingConfig

# Where launchers tell a process its rank, how many there are, its rank on its machine, and how many are there.
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LAUNCHER_VARIABLES = (
    TORCH_VARIABLES,
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),  # Open MPI
    tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),  # MVAPICH
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun
)

PEER_FAILURE = re.compile("timed? ?out|connection (closed|reset)|peer", re.IGNORECASE)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """accelerate's engine, with the precision and devices of `accelerate launch`; ValueError as `start_accelerator`."""
    if "wandb" in config.trackers and not utils.is_wandb_available():
        raise ValueError("trackers: wandb is not installed; `pip install wandb` or leave it out")
    folders = utils.ProjectConfiguration(str(config.run), logging_dir=str(config.run / "tensorboard"))
    accelerator = start_accelerator(config.timeout, log_with=list(config.trackers) or None, project_config=folders)
    utils.set_seed(config.seed)  # initial weights; every later draw is keyed
    return accelerator


def start_accelerator(timeout: int, **settings: Any) -> Accelerator:
    """An Accelerator of all ranks that a launcher started, whose collectives wait for `timeout` seconds.

    ValueError where they would not know of each other: each would train alone, and write what the others write.
    """
    world = read_ranks()
    if world > 1 and torch.accelerator.current_accelerator(check_available=True) is None:
        os.environ["ACCELERATE_USE_CPU"] = "1"  # else accelerate connects no ranks where it finds no GPU
    group = utils.InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    ddp = utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy
    accelerator = Accelerator(kwargs_handlers=[group, ddp], **settings)
    if accelerator.num_processes < world:
        raise ValueError(f"{world} ranks were launched, which {accelerator.device.type} cannot connect: launch one")
    if accelerator.device.type == "cpu":
        restore_num_threads()
    allow_tf32(accelerator.device)
    torch.backends.cudnn.benchmark = True  # the shapes of batches hardly change
    return accelerator


def read_ranks() -> int:
    """How many ranks a launcher started; its variables are also set under torch's names. ValueError: half of them."""
    names = next((names for names in LAUNCHER_VARIABLES if os.environ.get(names[1])), TORCH_VARIABLES)
    rank, world, local_rank, local_world = (os.environ.get(name, "") for name in names)
    if not world and _launched_alone():
        raise ValueError(
            "--num_processes: accelerate launch started one process, since there are not as many GPUs: use "
            "`python scripts/launch.py --num_processes N scripts/...`, or leave it out"
        )
    if world in ("", "1"):
        return 1
    if not rank:
        raise ValueError(f"{names[1]} is {world}, but {names[0]} is not set: start all ranks with scripts/launch.py")
    local_world = local_world.split("(")[0].split(",")[0] or "1"  # Slurm has `4(x2)` for two machines
    if "MASTER_ADDR" not in os.environ and local_world != world:
        raise ValueError(f"MASTER_ADDR is not set: set it to the host name of rank 0 for all {world} ranks")
    os.environ |= dict(zip(TORCH_VARIABLES, (rank, world, local_rank or "0", local_world), strict=True))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    return int(world)


def _launched_alone() -> bool:
    """Whether `accelerate launch` was asked for several processes or machines, and did not tell this one its rank."""
    return has_launcher() and "MASTER_ADDR" in os.environ and "MASTER_ADDR" not in launcher_environment()


def ranks_of(accelerator: Accelerator) -> Ranks:
    """All ranks of an accelerator."""
    if accelerator.num_processes == 1:
        return ONE_RANK
    return Ranks(accelerator.process_index, accelerator.num_processes, utils.gather_object)


def training_precision(accelerator: Accelerator) -> str:
    """What a launcher chose, by `--mixed_precision`."""
    mixed: str = accelerator.mixed_precision
    return "float32" if mixed == "no" else mixed


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
def disconnect_at_end(accelerator: Accelerator) -> Iterator[None]:
    """Part the ranks when they are done, or have an error that is all of theirs: one that exits before may be aborted.

    After another error the rank must exit at once, since its peers would wait for it.
    """
    try:
        yield
    except ValueError:
        accelerator.state.destroy_process_group()
        raise
    accelerator.state.destroy_process_group()


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
    return "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ  # which no person sets


def launcher_environment() -> dict[str, str]:
    """What a person set: the environment in which the launcher itself started; empty where it cannot be read."""
    import psutil

    try:
        return psutil.Process(os.getppid()).environ()
    except (psutil.Error, OSError):
        return {}


def launcher_command() -> list[str]:
    """The words with which a person started the launcher; none where they cannot be read."""
    import psutil

    try:
        return psutil.Process(os.getppid()).cmdline()
    except (psutil.Error, OSError):
        return []


def restore_num_threads() -> None:
    """Share out all cores: launchers that find no GPU give each process one thread, unless a person set a number."""
    if has_launcher() and os.environ.get("OMP_NUM_THREADS") == "1" and not _person_set_threads():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _person_set_threads() -> bool:
    """Whether the launcher was given a number of threads, in its environment or by a flag of accelerate."""
    flags = (word.split("=")[0].replace("-", "_") for word in launcher_command())
    return "OMP_NUM_THREADS" in launcher_environment() or "__num_cpu_threads_per_process" in flags
