"""How a machine would train some stages: batch and memory, time, and the largest recipe for some hours."""

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ldm.planning.cost import Cost, Loss, dry_run, largest_batch, time_step
from ldm.planning.device import GIB, format_bytes, total_memory
from ldm.training.config import TrainingConfig

MEMORY_FRACTION, RUNTIME_OVERHEAD_BYTES = (
    0.9,
    GIB,
)  # share of the memory that is used; bytes that Python, or CUDA, need for themselves
SKIP_FACTOR = 4  # a recipe that looks this many times too long, by its FLOP, is not measured


class MachineSpec(NamedTuple):
    """What is planned for."""

    gpus: int
    usable_bytes: int  # bytes for training, in each process
    device: torch.device | None  # where steps are measured; None: nowhere
    tflops: float | None  # that training reaches on each GPU, where it is known

    @property
    def processes(self) -> int:
        return max(self.gpus, 1)


class StageEstimate(NamedTuple):
    """One stage of a recipe, its network and its loss, on random images."""

    stage: str
    file: Path
    config: TrainingConfig
    size: int
    build: Callable[[bool], nn.Module]  # with gradient checkpointing or without
    loss: Loss
    latent_cache_bytes: int = 0  # bytes of an image that are kept in memory, its latents
    flags: str = ""  # that its command needs beside
    unsplittable: bool = False  # can not be cut: no micro-batches, no gradient checkpointing, no --fsdp


class Recipe(NamedTuple):
    """The stages of a folder of configs/."""

    name: str
    jobs: list[StageEstimate]

    def flop(self, *, bf16: bool) -> float:
        """Of all its steps."""
        each = (job.config.steps * job.config.batch_size * cost_per_image(job, bf16=bf16).flop for job in self.jobs)
        return float(sum(each))


class StagePlan(NamedTuple):
    """A stage as a machine trains it."""

    job: StageEstimate
    parameters: int
    gradient_checkpointing: bool
    fsdp: bool
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


def detect_machine(gpus: int | None, memory_gib: float | None, tflops: float | None) -> MachineSpec:
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
    return MachineSpec(
        gpus, max(0, int(MEMORY_FRACTION * memory) - RUNTIME_OVERHEAD_BYTES), here if measured else None, tflops
    )


@cache
def cost(job: StageEstimate, images: int, recompute: bool, bf16: bool) -> Cost:
    """Of a step of one process."""
    return dry_run(partial(job.build, recompute), job.loss, images, bf16=bf16)


def cost_per_image(job: StageEstimate, *, bf16: bool) -> Cost:
    """Of one image, as the recipe has it."""
    return cost(job, 1, job.config.gradient_checkpointing, bf16)


def fit_to_memory(job: StageEstimate, machine: MachineSpec) -> StagePlan:
    """The largest micro-batch that fits, with what saves memory where nothing fits without; its rate comes later.

    ValueError where nothing fits.
    """
    processes, bf16 = machine.processes, machine.gpus > 0
    share = max(1, round(job.config.batch_size / processes))
    ways = [(job.config.gradient_checkpointing, False), (True, False), (True, True)]
    for recompute, split in ways[:1] if job.unsplittable else ways[: 3 if processes > 1 else 2]:

        def memory(images: int, recompute: bool = recompute, split: bool = split) -> int:
            return cost(job, images, recompute, bf16).memory(processes, split=split)

        images = largest_batch(memory, machine.usable_bytes, share)
        if images:
            batch = (images if job.unsplittable else share) * processes
            parameters = cost_per_image(job, bf16=bf16).parameters
            return StagePlan(job, parameters, recompute, split, images, batch, memory(images), processes, math.inf)
    raise ValueError(
        f"{job.file}: one image needs {format_bytes(memory(1))}, there is room for {format_bytes(machine.usable_bytes)}"
    )


def measure(row: StagePlan, machine: MachineSpec) -> StagePlan:
    """With its rate: measured, or from the TFLOP/s that were given."""
    bf16 = machine.gpus > 0
    if machine.device is None:
        seconds = cost(row.job, row.images, row.gradient_checkpointing, bf16).flop / (
            1e12 * (machine.tflops or math.nan)
        )
    else:
        build = partial(row.job.build, row.gradient_checkpointing)
        seconds = time_step(build, row.job.loss, row.images, machine.device, bf16=bf16)
    return row._replace(rate=machine.processes * row.images / seconds)


def choose_recipe(found: list[Recipe], machine: MachineSpec, hours: float) -> tuple[Recipe, list[StagePlan]]:
    """The largest recipe, by its FLOP, whose own steps fit in the hours; the smallest, where none does.

    ValueError when not even that one fits in the memory.
    """
    bf16, best = machine.gpus > 0, None
    for recipe in sorted(found, key=lambda one: one.flop(bf16=bf16)):
        if best and total_hours(best[1]) * recipe.flop(bf16=bf16) / best[0].flop(bf16=bf16) > SKIP_FACTOR * hours:
            break
        try:
            rows = [measure(fit_to_memory(job, machine), machine) for job in recipe.jobs]
        except ValueError:
            if best is None:
                raise
            break
        if best and total_hours(rows) > hours:
            break
        best = recipe, rows
    assert best is not None
    return best


def total_hours(rows: list[StagePlan]) -> float:
    """Of the recipe's own steps, all stages."""
    return sum(row.seconds for row in rows) / 3600
