"""Choose a recipe for some images, a machine and some hours, and tell batch, memory, time and the commands.

Memory comes from a dry run of each network; times from a few real steps on this machine, or from --tflops.
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_clip
import train_ldm
import train_vae
from pydantic import Field

from ldm.cli import ScriptConfig, exit_on_user_error, parse_cli
from ldm.config import read_yaml
from ldm.planning.cost import TIMED_STEPS
from ldm.planning.device import format_bytes, format_duration
from ldm.planning.doctor import MIN_DOCTOR_STEPS
from ldm.planning.planner import (
    RUNTIME_OVERHEAD_BYTES,
    MachineSpec,
    Recipe,
    StageEstimate,
    StagePlan,
    choose_recipe,
    cost_per_image,
    detect_machine,
    total_hours,
)
from ldm.stages import clip_step, unet_step, vae_step

ROOT = Path(__file__).parents[1]
MAX_SIZE_FACTOR = 2  # a recipe is taken at sizes up to this factor from its own
LATENT_CACHE_FRACTION = 0.25  # share of a process's memory that those of all images may take


class PlanConfig(ScriptConfig):
    """Settings of plan."""

    num_images: int = Field(10_000, ge=2)
    """how many there are"""
    size: int = Field(64, ge=8)
    """side in pixels that they are trained at"""
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


def recipe_stages(folder: Path, size: int, most: float = math.inf) -> list[StageEstimate]:
    """The stages of a recipe at another size; one that has no clip.yaml takes a published text tower.

    Latents are kept in memory where the recipe says so and an image's take at most so many bytes.
    """
    files = {stage: folder / f"{stage}.yaml" for stage in ("clip", "vae", "ldm")}
    ldm, vae = read(train_ldm.TrainLDMConfig, files["ldm"]), read(train_vae.TrainVAEConfig, files["vae"])
    channels, jobs, own_tower = ldm.data.channels, [], None
    if files["clip"].is_file():
        clip = read(train_clip.TrainCLIPConfig, files["clip"])
        own_tower = clip.clip.architecture(size)
        jobs.append(
            StageEstimate(
                "clip", files["clip"], clip, size, *clip_step(clip.clip, (channels, size, size)), unsplittable=True
            )
        )
    own = size if vae.data.size == ldm.data.size else vae.data.size
    jobs.append(StageEstimate("vae", files["vae"], vae, own, *vae_step(vae.vae, vae.loss, (channels, own, own))))
    towers = [(tower, own_tower) for tower in (ldm.text, ldm.second_text) if tower.model != "none"]
    kept = 8 * ldm.unet.in_channels * vae.vae.latent_size(size) ** 2 if ldm.cache_latents else 0  # mean and deviation
    flags = "" if kept <= most else " --no-cache-latents"
    step = unet_step(ldm.unet, vae.vae, towers, (channels, size, size), encoded=ldm.cache_latents and not flags)
    return [*jobs, StageEstimate("ldm", files["ldm"], ldm, size, *step, kept, flags)]


def read(settings: Any, path: Path) -> Any:
    """The configuration of a stage."""
    return settings.from_dict(read_yaml(path), source=str(path))


def recipes(size: int, most: float = math.inf) -> list[Recipe]:
    """Those of configs/ that can be taken at a size; `most` as in `jobs_of`. ValueError when there is none."""
    found, refused = [], []
    for file in sorted((ROOT / "configs").glob("*/ldm.yaml")):
        own = read(train_ldm.TrainLDMConfig, file).data.size
        if own / MAX_SIZE_FACTOR <= size <= own * MAX_SIZE_FACTOR:
            try:
                found.append(Recipe(file.parent.name, recipe_stages(file.parent, size, most)))
            except ValueError as error:
                refused.append(f"configs/{file.parent.name}: {error}")
    if not found:
        near = "; ".join(refused) or "no recipe of configs/ is near"
        raise ValueError(f"--size {size}: {near}; 32, 64, 128, 256, 512, 768 and 1024 have some")
    return found


def requirements_table(found: list[Recipe], machine: MachineSpec, hours: float) -> list[str]:
    """What each recipe asks of a machine whose rate is not known."""
    lines = [f"{'recipe':12}  {'GFLOP/image':>11}  {'memory from':>11}  {'TFLOP/s a GPU needed':>20}"]
    for recipe in found:
        last = cost_per_image(recipe.jobs[-1], bf16=True)
        rate, memory = (
            recipe.flop(bf16=True) / (hours * 3600 * machine.processes) / 1e12,
            last.memory() + RUNTIME_OVERHEAD_BYTES,
        )
        lines.append(f"{recipe.name:12}  {last.flop / 1e9:>11,.1f}  {format_bytes(memory):>11}  {rate:>20.3g}")
    return lines


def table(rows: list[StagePlan], share: float, images: int) -> list[str]:
    """What each stage is and takes."""
    heads = ("stage", "parameters", "batch", "memory", "images/s", "steps", "epochs", "time")
    cells = [heads]
    for row in rows:
        steps, each = row.steps(share), row.accumulate
        batch = f"{row.batch} = {each} x {row.batch // each}"
        taken = (
            f"{row.rate:,.1f}",
            f"{steps:,}",
            f"{steps * row.batch / images:,.1f}",
            format_duration(share * row.seconds),
        )
        cells.append(
            (row.job.stage, f"{row.parameters:,}", batch, format_bytes(row.memory + RUNTIME_OVERHEAD_BYTES), *taken)
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def training_command(row: StagePlan, share: float, config: PlanConfig, machine: MachineSpec) -> str:
    """What trains a stage."""
    launch = "accelerate launch"
    if machine.gpus:
        launch += " --mixed-precision bf16" + f" --multi-gpu --num-processes {machine.gpus}" * (machine.gpus > 1)
    job, steps = row.job, row.steps(share)
    flags: dict[str, object] = {
        "data.source": config.source,
        "data.resolution": job.size,
        "run": config.run / job.stage,
    }
    wanted = {"steps": steps, "batch_size": row.batch, "grad_accum_steps": row.accumulate}
    wanted["warmup_steps"] = min(job.config.warmup_steps, steps // 10)
    flags |= {name.replace("_", "-"): n for name, n in wanted.items() if n != getattr(job.config, name)}
    told = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())
    told += " --gradient-checkpointing" * (row.gradient_checkpointing and not job.config.gradient_checkpointing)
    told += " --fsdp" * row.fsdp + job.flags
    return f"{launch} scripts/train_{job.stage}.py --config {job.file.relative_to(ROOT)} {told}"


def plan(config: PlanConfig) -> list[str]:
    """What is said of it."""
    machine = detect_machine(config.gpus, config.memory_gib, config.tflops)
    found = recipes(config.size, LATENT_CACHE_FRACTION * machine.usable_bytes / config.num_images)
    kind = f"{machine.gpus} GPU" + "s" * (machine.gpus > 1) if machine.gpus else "no GPU"
    asked = f"{config.num_images:,} images of {config.size} pixels, {kind}, {config.hours:g} h"
    if machine.device is None and machine.tflops is None:
        how = "how fast the machine trains is not known: run this on it, or give --tflops, what training reaches there"
        return [asked, "", *requirements_table(found, machine, config.hours), "", how]
    recipe, rows = choose_recipe(found, machine, config.hours)
    share = min(1.0, config.hours / total_hours(rows))
    rest = f"its own steps take {format_duration(3600 * total_hours(rows))}"
    if share < 1:
        rest += f", so there is time for {share:.0%} of them"
    where = (
        f"{machine.tflops:g} TFLOP/s a GPU, as given" if machine.tflops else f"{TIMED_STEPS} real steps on this machine"
    )
    last = rows[-1]
    kept = f"all of them take {format_bytes(config.num_images * last.job.latent_cache_bytes)} of memory in each process"
    latents = f"latents: {'encoded in each step, as ' if last.job.flags else ''}{kept}"
    doctor = training_command(last, share, config, machine).replace("train_ldm.py", "doctor.py ldm")
    return [
        asked,
        f"configs/{recipe.name}, of {', '.join(one.name for one in found)}: {rest}",
        "",
        *table(rows, share, config.num_images),
        "",
        "batch = micro-batches x images in each, over all processes",
        f"memory: of each process, from a dry run, and {format_bytes(RUNTIME_OVERHEAD_BYTES)} for Python or CUDA itself",
        *([latents] if last.job.latent_cache_bytes else []),
        f"images/s: {where}, without loading data and traffic between GPUs; the doctor measures all of it",
        "",
        *(training_command(row, share, config, machine) for row in rows),
        *([doctor] if last.steps(share) >= MIN_DOCTOR_STEPS else []),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(PlanConfig, argv, default=None, description=__doc__)
    with exit_on_user_error():
        print("\n".join(plan(config)))


if __name__ == "__main__":
    main()
