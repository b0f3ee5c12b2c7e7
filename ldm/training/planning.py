"""How a machine would train some stages: batch and memory, time, and the largest recipe for some hours."""

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ldm.training.budget import Cost, Loss, dry_run, largest_batch, seconds_of_step
from ldm.training.loop import TrainingConfig
from ldm.training.machine import GIB, in_bytes, total_memory

FULL, ITSELF = 0.9, GIB  # share of the memory that is used; bytes that Python, or CUDA, need for themselves
FAR = 4  # a recipe that looks this many times too long, by its FLOP, is not measured


class Machine(NamedTuple):
    """What is planned for."""

    gpus: int
    room: int  # bytes for training, in each process
    device: torch.device | None  # where steps are measured; None: nowhere
    tflops: float | None  # that training reaches on each GPU, where it is known

    @property
    def processes(self) -> int:
        return max(self.gpus, 1)


class Job(NamedTuple):
    """One stage of a recipe, its network and its loss, on random images."""

    stage: str
    file: Path
    config: TrainingConfig
    size: int
    build: Callable[[bool], nn.Module]  # with gradient checkpointing or without
    loss: Loss
    kept: int = 0  # bytes of an image that are kept in memory, its latents
    flags: str = ""  # that its command needs beside
    whole: bool = False  # can not be cut: no micro-batches, no gradient checkpointing, no --shard


class Recipe(NamedTuple):
    """The stages of a folder of configs/."""

    name: str
    jobs: list[Job]

    def flop(self, *, bf16: bool) -> float:
        """Of all its steps."""
        each = (job.config.steps * job.config.batch_size * own_cost(job, bf16=bf16).flop for job in self.jobs)
        return float(sum(each))


class Row(NamedTuple):
    """A stage as a machine trains it."""

    job: Job
    parameters: int
    recompute: bool
    split: bool
    images: int  # in a micro-batch of one process
    batch: int  # in a step
    memory: int  # bytes in each process
    processes: int
    rate: float  # images/s of all processes

    @property
    def seconds(self) -> float:
        """Of the recipe's own steps."""
        return self.job.config.steps * self.batch / self.rate

    @property
    def accumulate(self) -> int:
        """Micro-batches in a step."""
        return -(-self.batch // (self.images * self.processes))

    def steps(self, share: float) -> int:
        """A share of the recipe's own."""
        return max(1, round(share * self.job.config.steps))


def machine_of(gpus: int | None, memory_gib: float | None, tflops: float | None) -> Machine:
    """What is planned for; None: as this machine has it.

    Steps are measured here where this machine has what the other has, unless TFLOP/s are given. ValueError when its
    memory is not known.
    """
    gpus = torch.cuda.device_count() if gpus is None else gpus
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    same = (gpus > 0) == (here.type == "cuda")
    if memory_gib is None and not same:
        raise ValueError("--memory-gib: say what the other machine has, in each GPU or where it has none in all")
    memory = int(memory_gib * GIB) if memory_gib else total_memory(here)
    measured = same and tflops is None and memory <= 1.05 * total_memory(here)
    return Machine(gpus, max(0, int(FULL * memory) - ITSELF), here if measured else None, tflops)


@cache
def cost(job: Job, images: int, recompute: bool, bf16: bool) -> Cost:
    """Of a step of one process."""
    return dry_run(partial(job.build, recompute), job.loss, images, bf16=bf16)


def own_cost(job: Job, *, bf16: bool) -> Cost:
    """Of one image, as the recipe has it."""
    return cost(job, 1, job.config.gradient_checkpointing, bf16)


def fit_in(job: Job, machine: Machine) -> Row:
    """The largest micro-batch that fits, with what saves memory where nothing fits without; its rate comes later.

    ValueError where nothing fits.
    """
    processes, bf16 = machine.processes, machine.gpus > 0
    share = max(1, round(job.config.batch_size / processes))
    ways = [(job.config.gradient_checkpointing, False), (True, False), (True, True)]
    for recompute, split in ways[:1] if job.whole else ways[: 3 if processes > 1 else 2]:

        def memory(images: int, recompute: bool = recompute, split: bool = split) -> int:
            return cost(job, images, recompute, bf16).memory(processes, split=split)

        images = largest_batch(memory, machine.room, share)
        if images:
            batch = (images if job.whole else share) * processes
            parameters = own_cost(job, bf16=bf16).parameters
            return Row(job, parameters, recompute, split, images, batch, memory(images), processes, math.inf)
    raise ValueError(f"{job.file}: one image needs {in_bytes(memory(1))}, there is room for {in_bytes(machine.room)}")


def timed(row: Row, machine: Machine) -> Row:
    """With its rate: measured, or from the TFLOP/s that were given."""
    bf16 = machine.gpus > 0
    if machine.device is None:
        seconds = cost(row.job, row.images, row.recompute, bf16).flop / (1e12 * (machine.tflops or math.nan))
    else:
        build = partial(row.job.build, row.recompute)
        seconds = seconds_of_step(build, row.job.loss, row.images, machine.device, bf16=bf16)
    return row._replace(rate=machine.processes * row.images / seconds)


def choose(found: list[Recipe], machine: Machine, hours: float) -> tuple[Recipe, list[Row]]:
    """The largest recipe, by its FLOP, whose own steps fit in the hours; the smallest, where none does.

    ValueError when not even that one fits in the memory.
    """
    bf16, best = machine.gpus > 0, None
    for recipe in sorted(found, key=lambda one: one.flop(bf16=bf16)):
        if best and hours_of(best[1]) * recipe.flop(bf16=bf16) / best[0].flop(bf16=bf16) > FAR * hours:
            break
        try:
            rows = [timed(fit_in(job, machine), machine) for job in recipe.jobs]
        except ValueError:
            if best is None:
                raise
            break
        if best and hours_of(rows) > hours:
            break
        best = recipe, rows
    assert best is not None
    return best


def hours_of(rows: list[Row]) -> float:
    """Of the recipe's own steps, all stages."""
    return sum(row.seconds for row in rows) / 3600
