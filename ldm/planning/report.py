"""The plan for a person: a table of the stages, and the commands that train them."""

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ldm.cli import ScriptConfig
from ldm.commands import quote, to_flags
from ldm.config import flatten, relative
from ldm.planning import planner
from ldm.planning.cost import TIMED_STEPS
from ldm.planning.device import format_bytes, format_duration
from ldm.planning.doctor import MIN_DOCTOR_STEPS
from ldm.planning.planner import RUNTIME_OVERHEAD_BYTES, Recipe, StagePlan


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
    machine = planner.detect_machine(config.gpus, config.memory_gib, config.tflops)
    found = planner.recipes(config.size, machine, config.num_images, config.source)
    gpus = f"{machine.gpus} GPU" + "s" * (machine.gpus > 1) if machine.gpus else "no GPU"
    request = f"{config.num_images:,} images of {config.size} pixels, {gpus}, {config.hours:g} h"
    if machine.device is None and machine.tflops is None:
        note = "the speed of the machine is unknown: run this on it, or pass --tflops, what training reaches there"
        return [request, "", *requirements_table(found, config.hours), "", note]

    recipe = planner.choose_recipe(found, config.hours)
    hours = planner.recipe_hours(recipe)
    fraction = min(1.0, config.hours / hours)
    needs = f"recipe needs {format_duration(3600 * hours)}"
    if fraction < 1:
        needs += f"; the budget covers {fraction:.0%} of its steps"
    recipe = [plan.shorten(fraction) for plan in recipe]
    commands = [training_command(plan, config) for plan in recipe]
    ldm = recipe[-1]
    if ldm.config.steps >= MIN_DOCTOR_STEPS:
        commands.append(commands[-1].replace("train_ldm.py", "doctor.py ldm"))
    rate = f"{machine.tflops:g} TFLOP/s a GPU, as given" if machine.tflops else f"{TIMED_STEPS} real steps here"
    latents = []
    if ldm.latent_bytes:
        needed = config.num_images * ldm.latent_bytes
        fits = needed <= planner.LATENT_CACHE_FRACTION * machine.usable_bytes
        encoded = "" if fits else "encoded in each step, since "
        latents = [f"latents: {encoded}all of them need {format_bytes(needed)} of memory on each rank"]
    return [
        request,
        f"configs/{ldm.file.parent.name}, of {', '.join(found)}: {needs}",
        "",
        *stage_table(recipe, config.num_images),
        "",
        "batch = micro-batches x images in each, over all ranks",
        f"memory: of each rank, from a dry run, and {format_bytes(RUNTIME_OVERHEAD_BYTES)} for Python or CUDA itself",
        *latents,
        f"images/s: {rate}, without loading data and traffic between GPUs; the doctor measures all of it",
        "",
        *commands,
    ]


def requirements_table(found: dict[str, Recipe], hours: float) -> list[str]:
    """What each recipe asks of a machine whose speed is unknown."""
    rows = [("recipe", "GFLOP/image", "memory from", "TFLOP/s a GPU needed")]
    for name, recipe in found.items():
        cost = recipe[-1].cost(1)
        tflops = planner.recipe_flop(recipe) / (hours * 3600 * recipe[-1].machine.ranks) / 1e12
        memory = format_bytes(cost.memory() + RUNTIME_OVERHEAD_BYTES)
        rows.append((name, f"{cost.flop / 1e9:,.1f}", memory, f"{tflops:.3g}"))
    return _aligned(rows)


def stage_table(recipe: Recipe, images: int) -> list[str]:
    """Size, memory, speed and time of each stage."""
    rows = [("stage", "parameters", "batch", "memory", "images/s", "steps", "epochs", "time")]
    for plan in recipe:
        steps, batch, micro_batches = plan.config.steps, plan.config.batch_size, plan.config.grad_accum_steps
        split, epochs = f"{batch} = {micro_batches} x {batch // micro_batches}", f"{steps * batch / images:,.1f}"
        parameters, memory = f"{plan.cost(1).parameters:,}", format_bytes(plan.memory + RUNTIME_OVERHEAD_BYTES)
        rate, duration = f"{plan.rate:,.1f}", format_duration(plan.seconds)
        rows.append((plan.file.stem, parameters, split, memory, rate, f"{steps:,}", epochs, duration))
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def training_command(plan: StagePlan, config: PlanConfig) -> str:
    """The command that trains a stage: its flags are what differs from the file of the recipe."""
    words, gpus, stage = ["accelerate launch"], plan.machine.gpus, plan.file.stem
    if gpus:
        words.append("--mixed_precision bf16")
    if gpus > 1:
        words.append(f"--multi_gpu --num_processes {gpus}")
    words.append(f"scripts/train_{stage}.py --config {quote(relative(plan.file).as_posix())}")
    recipe, planned = flatten(planner.read_recipe(plan.file).to_dict()), flatten(plan.config.to_dict())
    planned |= {"run": str(config.run / stage), "data.source": config.source}
    words += [quote(*to_flags({key: value for key, value in planned.items() if value != recipe[key]}))]
    return " ".join(words)
