"""The plan for a person: a table of the stages, and the commands that train them."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ldm.cli import ScriptConfig
from ldm.config import CONFIGS, flatten
from ldm.planning.cost import TIMED_STEPS
from ldm.planning.device import format_bytes, format_duration
from ldm.planning.doctor import MIN_DOCTOR_STEPS
from ldm.planning.planner import (
    RUNTIME_OVERHEAD_BYTES,
    MachineSpec,
    StageEstimate,
    StagePlan,
    choose_recipe,
    detect_machine,
    read_recipe,
    recipe_flop,
    recipes,
    total_hours,
)

LATENT_CACHE_FRACTION = 0.25  # of a rank's memory, for the latents of all images


class PlanConfig(ScriptConfig):
    """Settings of plan."""

    num_images: int = Field(10_000, ge=2)
    size: int = Field(64, ge=8)
    """resolution in pixels that they are trained at"""
    hours: float = Field(8.0, gt=0)
    """for all stages together"""
    gpus: int | None = Field(None, ge=0)
    """0 for a machine without; left out: those of this machine"""
    memory_gib: float | None = Field(None, gt=0)
    """of each GPU, or of a machine without; left out: that of this machine"""
    tflops: float | None = Field(None, gt=0, lt=math.inf)
    """TFLOP/s that training reaches on each GPU, for another machine than this one; left out: measured here"""
    source: str = "FOLDER"
    """where the images are, for the commands"""
    run: Path = Path("runs/plan")
    """where the runs will be, for the commands"""


def make_plan(config: PlanConfig) -> list[str]:
    """The report, line by line. ValueError: no recipe for this resolution, or none that fits in the memory."""
    machine = detect_machine(config.gpus, config.memory_gib, config.tflops)
    max_latent_bytes = LATENT_CACHE_FRACTION * machine.usable_bytes / config.num_images
    found = recipes(config.size, max_latent_bytes)
    gpus = f"{machine.gpus} GPU" + "s" * (machine.gpus > 1) if machine.gpus else "no GPU"
    request = f"{config.num_images:,} images of {config.size} pixels, {gpus}, {config.hours:g} h"
    if machine.device is None and machine.tflops is None:
        note = "the speed of the machine is unknown: run this on it, or pass --tflops, what training reaches there"
        return [request, "", *requirements_table(found, machine, config.hours), "", note]

    plans = choose_recipe(found, machine, config.hours)
    fraction, last = min(1.0, config.hours / total_hours(plans)), plans[-1]
    needs = f"recipe needs {format_duration(3600 * total_hours(plans))}"
    if fraction < 1:
        needs += f"; the budget covers {fraction:.0%} of its steps"
    commands = [training_command(plan, fraction, config) for plan in plans]
    if last.steps(fraction) >= MIN_DOCTOR_STEPS:
        commands.append(commands[-1].replace("train_ldm.py", "doctor.py ldm"))
    notes = [
        "batch = micro-batches x images in each, over all ranks",
        f"memory: of each rank, from a dry run, and {format_bytes(RUNTIME_OVERHEAD_BYTES)} for Python or CUDA itself",
    ]
    if latent_bytes := last.estimate.latent_bytes:
        encoded = "encoded in each step, since " if latent_bytes > max_latent_bytes else ""
        needed = format_bytes(config.num_images * latent_bytes)
        notes.append(f"latents: {encoded}all of them need {needed} of memory on each rank")
    rate = f"{machine.tflops:g} TFLOP/s a GPU, as given" if machine.tflops else f"{TIMED_STEPS} real steps here"
    notes.append(f"images/s: {rate}, without loading data and traffic between GPUs; the doctor measures all of it")
    recipe = f"configs/{last.estimate.file.parent.name}, of {', '.join(found)}: {needs}"
    return [request, recipe, "", *stage_table(plans, fraction, config.num_images), "", *notes, "", *commands]


def requirements_table(found: dict[str, list[StageEstimate]], machine: MachineSpec, hours: float) -> list[str]:
    """What each recipe asks of a machine whose speed is unknown."""
    rows = [("recipe", "GFLOP/image", "memory from", "TFLOP/s a GPU needed")]
    for name, stages in found.items():
        cost = stages[-1].cost_per_image(bf16=True)
        tflops = recipe_flop(stages, bf16=True) / (hours * 3600 * machine.ranks) / 1e12
        memory = format_bytes(cost.memory() + RUNTIME_OVERHEAD_BYTES)
        rows.append((name, f"{cost.flop / 1e9:,.1f}", memory, f"{tflops:.3g}"))
    return _aligned(rows)


def stage_table(plans: list[StagePlan], fraction: float, images: int) -> list[str]:
    """Size, memory, speed and time of each stage, for a fraction of the recipe's own steps."""
    rows = [("stage", "parameters", "batch", "memory", "images/s", "steps", "epochs", "time")]
    for plan in plans:
        steps, micro_batches = plan.steps(fraction), plan.grad_accum_steps
        rows.append(
            (
                plan.estimate.stage,
                f"{plan.cost.parameters:,}",
                f"{plan.batch} = {micro_batches} x {plan.batch // micro_batches}",
                format_bytes(plan.memory + RUNTIME_OVERHEAD_BYTES),
                f"{plan.rate:,.1f}",
                f"{steps:,}",
                f"{steps * plan.batch / images:,.1f}",
                format_duration(fraction * plan.seconds),
            )
        )
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def training_command(plan: StagePlan, fraction: float, config: PlanConfig) -> str:
    """The command that trains a stage: its flags are what differs from the file of the recipe."""
    launch, gpus = "accelerate launch", plan.machine.gpus
    if gpus:
        launch += " --mixed_precision bf16"
    if gpus > 1:
        launch += f" --multi_gpu --num_processes {gpus}"
    estimate, steps = plan.estimate, plan.steps(fraction)
    recipe, planned = flatten(read_recipe(estimate.file).to_dict()), flatten(estimate.config.to_dict())
    planned |= {
        "run": str(config.run / estimate.stage),
        "data.source": config.source,
        "steps": steps,
        "batch_size": plan.batch,
        "grad_accum_steps": plan.grad_accum_steps,
        "warmup_steps": min(estimate.config.warmup_steps, steps // 10),
        "gradient_checkpointing": plan.gradient_checkpointing,
        "fsdp": plan.fsdp,
    }
    file = Path("configs") / estimate.file.relative_to(CONFIGS)
    words = [launch, f"scripts/train_{estimate.stage}.py --config {file}"]
    for key, value in planned.items():
        flag = key.replace("_", "-")
        if value == recipe[key]:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join(words)
