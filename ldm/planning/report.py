"""The plan for a person: a table of the stages, and the commands that train them."""

import math
import shlex
from pathlib import Path

from pydantic import Field

from ldm.cli import ScriptConfig
from ldm.config import CONFIGS
from ldm.planning.cost import TIMED_STEPS
from ldm.planning.device import format_bytes, format_duration
from ldm.planning.doctor import MIN_DOCTOR_STEPS
from ldm.planning.planner import (
    RUNTIME_OVERHEAD_BYTES,
    MachineSpec,
    Recipe,
    StagePlan,
    choose_recipe,
    cost_per_image,
    detect_machine,
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
    found = recipes(config.size, LATENT_CACHE_FRACTION * machine.usable_bytes / config.num_images)
    gpus = f"{machine.gpus} GPU" + "s" * (machine.gpus > 1) if machine.gpus else "no GPU"
    request = f"{config.num_images:,} images of {config.size} pixels, {gpus}, {config.hours:g} h"
    if machine.device is None and machine.tflops is None:
        note = "the speed of the machine is unknown: run this on it, or pass --tflops, what training reaches there"
        return [request, "", *requirements_table(found, machine, config.hours), "", note]
    recipe, plans = choose_recipe(found, machine, config.hours)
    fraction = min(1.0, config.hours / total_hours(plans))
    needs = f"recipe needs {format_duration(3600 * total_hours(plans))}"
    if fraction < 1:
        needs += f"; the budget covers {fraction:.0%} of its steps"
    rate = f"{machine.tflops:g} TFLOP/s a GPU, as given" if machine.tflops else f"{TIMED_STEPS} real steps here"
    last = plans[-1]
    doctor = training_command(last, fraction, config, machine).replace("train_ldm.py", "doctor.py ldm")
    overhead = format_bytes(RUNTIME_OVERHEAD_BYTES)
    return [
        request,
        f"configs/{recipe.name}, of {', '.join(one.name for one in found)}: {needs}",
        "",
        *stage_table(plans, fraction, config.num_images),
        "",
        "batch = micro-batches x images in each, over all ranks",
        f"memory: of each rank, from a dry run, and {overhead} for Python or CUDA itself",
        *_latents_line(last, config.num_images),
        f"images/s: {rate}, without loading data and traffic between GPUs; the doctor measures all of it",
        "",
        *(training_command(plan, fraction, config, machine) for plan in plans),
        *([doctor] if last.steps(fraction) >= MIN_DOCTOR_STEPS else []),
    ]


def _latents_line(plan: StagePlan, images: int) -> list[str]:
    if not plan.estimate.latent_cache_bytes:
        return []
    size = format_bytes(images * plan.estimate.latent_cache_bytes)
    if plan.estimate.flags:
        return [f"latents: encoded in each step, since all of them need {size} of memory on each rank"]
    return [f"latents: all of them need {size} of memory on each rank"]


def requirements_table(found: list[Recipe], machine: MachineSpec, hours: float) -> list[str]:
    """What each recipe asks of a machine whose speed is unknown."""
    lines = [f"{'recipe':12}  {'GFLOP/image':>11}  {'memory from':>11}  {'TFLOP/s a GPU needed':>20}"]
    for recipe in found:
        last = cost_per_image(recipe.stages[-1], bf16=True)
        tflops = recipe.flop(bf16=True) / (hours * 3600 * machine.ranks) / 1e12
        memory = format_bytes(last.memory() + RUNTIME_OVERHEAD_BYTES)
        lines.append(f"{recipe.name:12}  {last.flop / 1e9:>11,.1f}  {memory:>11}  {tflops:>20.3g}")
    return lines


def stage_table(plans: list[StagePlan], fraction: float, images: int) -> list[str]:
    """Size, memory, speed and time of each stage, for a fraction of the recipe's own steps."""
    rows = [("stage", "parameters", "batch", "memory", "images/s", "steps", "epochs", "time")]
    for plan in plans:
        steps, micro_batches = plan.steps(fraction), plan.grad_accum_steps
        rows.append(
            (
                plan.estimate.stage,
                f"{plan.parameters:,}",
                f"{plan.batch} = {micro_batches} x {plan.batch // micro_batches}",
                format_bytes(plan.memory + RUNTIME_OVERHEAD_BYTES),
                f"{plan.rate:,.1f}",
                f"{steps:,}",
                f"{steps * plan.batch / images:,.1f}",
                format_duration(fraction * plan.seconds),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def training_command(plan: StagePlan, fraction: float, config: PlanConfig, machine: MachineSpec) -> str:
    """The command that trains a stage."""
    launch = "accelerate launch"
    if machine.gpus:
        launch += " --mixed_precision bf16"
    if machine.gpus > 1:
        launch += f" --multi_gpu --num_processes {machine.gpus}"
    estimate, steps = plan.estimate, plan.steps(fraction)
    own = estimate.config
    flags: dict[str, object] = {
        "data.source": config.source,
        "data.resolution": estimate.resolution,
        "run": config.run / estimate.stage,
    }
    changed = {
        "steps": steps,
        "batch_size": plan.batch,
        "grad_accum_steps": plan.grad_accum_steps,
        "warmup_steps": min(own.warmup_steps, steps // 10),
    }
    flags |= {name.replace("_", "-"): value for name, value in changed.items() if value != getattr(own, name)}
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
    words += ["--gradient-checkpointing"] if plan.gradient_checkpointing and not own.gradient_checkpointing else []
    words += ["--fsdp"] if plan.fsdp else []
    file = Path("configs") / estimate.file.relative_to(CONFIGS)
    return f"{launch} scripts/train_{estimate.stage}.py --config {file} {' '.join(words)}{estimate.flags}"
