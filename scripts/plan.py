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

from ldm.config import ScriptConfig, errors_for_people, parse, read_yaml
from ldm.stages import clip_step, unet_step, vae_step
from ldm.training.budget import TIMED
from ldm.training.doctor import FEWEST
from ldm.training.machine import in_bytes, in_time
from ldm.training.planning import ITSELF, Job, Machine, Recipe, Row, choose, hours_of, machine_of, own_cost

ROOT = Path(__file__).parents[1]
NEAR = 2  # a recipe is taken at sizes up to this factor from its own
LATENTS = 0.25  # share of a process's memory that those of all images may take


class Plan(ScriptConfig):
    """Settings of plan."""

    images: int = Field(10_000, ge=2)
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


def jobs_of(folder: Path, size: int, most: float = math.inf) -> list[Job]:
    """The stages of a recipe at another size; one that has no clip.yaml takes a published text tower.

    Latents are kept in memory where the recipe says so and an image's take at most so many bytes.
    """
    files = {stage: folder / f"{stage}.yaml" for stage in ("clip", "vae", "ldm")}
    ldm, vae = read(train_ldm.TrainLDM, files["ldm"]), read(train_vae.TrainVAE, files["vae"])
    channels, jobs, own_tower = ldm.data.channels, [], None
    if files["clip"].is_file():
        clip = read(train_clip.TrainCLIP, files["clip"])
        own_tower = clip.clip.architecture(size)
        jobs.append(Job("clip", files["clip"], clip, size, *clip_step(clip.clip, (channels, size, size)), whole=True))
    own = size if vae.data.size == ldm.data.size else vae.data.size
    jobs.append(Job("vae", files["vae"], vae, own, *vae_step(vae.vae, vae.loss, (channels, own, own))))
    towers = [(tower, own_tower) for tower in (ldm.text, ldm.second_text) if tower.model != "none"]
    kept = 8 * ldm.unet.in_channels * vae.vae.latent_size(size) ** 2 if ldm.cache_latents else 0  # mean and deviation
    flags = "" if kept <= most else " --no-cache-latents"
    step = unet_step(ldm.unet, vae.vae, towers, (channels, size, size), encoded=ldm.cache_latents and not flags)
    return [*jobs, Job("ldm", files["ldm"], ldm, size, *step, kept, flags)]


def read(settings: Any, path: Path) -> Any:
    """The configuration of a stage."""
    return settings.from_dict(read_yaml(path), source=str(path))


def recipes(size: int, most: float = math.inf) -> list[Recipe]:
    """Those of configs/ that can be taken at a size; `most` as in `jobs_of`. ValueError when there is none."""
    found, refused = [], []
    for file in sorted((ROOT / "configs").glob("*/ldm.yaml")):
        own = read(train_ldm.TrainLDM, file).data.size
        if own / NEAR <= size <= own * NEAR:
            try:
                found.append(Recipe(file.parent.name, jobs_of(file.parent, size, most)))
            except ValueError as error:
                refused.append(f"configs/{file.parent.name}: {error}")
    if not found:
        near = "; ".join(refused) or "no recipe of configs/ is near"
        raise ValueError(f"--size {size}: {near}; 32, 64, 128, 256, 512, 768 and 1024 have some")
    return found


def needs(found: list[Recipe], machine: Machine, hours: float) -> list[str]:
    """What each recipe asks of a machine whose rate is not known."""
    lines = [f"{'recipe':12}  {'GFLOP/image':>11}  {'memory from':>11}  {'TFLOP/s a GPU needed':>20}"]
    for recipe in found:
        last = own_cost(recipe.jobs[-1], bf16=True)
        rate, memory = recipe.flop(bf16=True) / (hours * 3600 * machine.processes) / 1e12, last.memory() + ITSELF
        lines.append(f"{recipe.name:12}  {last.flop / 1e9:>11,.1f}  {in_bytes(memory):>11}  {rate:>20.3g}")
    return lines


def table(rows: list[Row], share: float, images: int) -> list[str]:
    """What each stage is and takes."""
    heads = ("stage", "parameters", "batch", "memory", "images/s", "steps", "epochs", "time")
    cells = [heads]
    for row in rows:
        steps, each = row.steps(share), row.accumulate
        batch = f"{row.batch} = {each} x {row.batch // each}"
        taken = f"{row.rate:,.1f}", f"{steps:,}", f"{steps * row.batch / images:,.1f}", in_time(share * row.seconds)
        cells.append((row.job.stage, f"{row.parameters:,}", batch, in_bytes(row.memory + ITSELF), *taken))
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def command(row: Row, share: float, config: Plan, machine: Machine) -> str:
    """What trains a stage."""
    launch = "accelerate launch"
    if machine.gpus:
        launch += " --mixed_precision bf16" + f" --multi_gpu --num_processes {machine.gpus}" * (machine.gpus > 1)
    job, steps = row.job, row.steps(share)
    flags: dict[str, object] = {"data.source": config.source, "data.size": job.size, "run": config.run / job.stage}
    wanted = {"steps": steps, "batch_size": row.batch, "accumulate": row.accumulate}
    wanted["warmup"] = min(job.config.warmup, steps // 10)
    flags |= {name.replace("_", "-"): n for name, n in wanted.items() if n != getattr(job.config, name)}
    told = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())
    told += " --gradient-checkpointing" * (row.recompute and not job.config.gradient_checkpointing)
    told += " --shard" * row.split + job.flags
    return f"{launch} scripts/train_{job.stage}.py --config {job.file.relative_to(ROOT)} {told}"


def plan(config: Plan) -> list[str]:
    """What is said of it."""
    machine = machine_of(config.gpus, config.memory_gib, config.tflops)
    found = recipes(config.size, LATENTS * machine.room / config.images)
    kind = f"{machine.gpus} GPU" + "s" * (machine.gpus > 1) if machine.gpus else "no GPU"
    asked = f"{config.images:,} images of {config.size} pixels, {kind}, {config.hours:g} h"
    if machine.device is None and machine.tflops is None:
        how = "how fast the machine trains is not known: run this on it, or give --tflops, what training reaches there"
        return [asked, "", *needs(found, machine, config.hours), "", how]
    recipe, rows = choose(found, machine, config.hours)
    share = min(1.0, config.hours / hours_of(rows))
    rest = f"its own steps take {in_time(3600 * hours_of(rows))}"
    if share < 1:
        rest += f", so there is time for {share:.0%} of them"
    where = f"{machine.tflops:g} TFLOP/s a GPU, as given" if machine.tflops else f"{TIMED} real steps on this machine"
    last = rows[-1]
    kept = f"all of them take {in_bytes(config.images * last.job.kept)} of memory in each process"
    latents = f"latents: {'encoded in each step, as ' if last.job.flags else ''}{kept}"
    doctor = command(last, share, config, machine).replace("train_ldm.py", "doctor.py ldm")
    return [
        asked,
        f"configs/{recipe.name}, of {', '.join(one.name for one in found)}: {rest}",
        "",
        *table(rows, share, config.images),
        "",
        "batch = micro-batches x images in each, over all processes",
        f"memory: of each process, from a dry run, and {in_bytes(ITSELF)} for Python or CUDA itself",
        *([latents] if last.job.kept else []),
        f"images/s: {where}, without loading data and traffic between GPUs; the doctor measures all of it",
        "",
        *(command(row, share, config, machine) for row in rows),
        *([doctor] if last.steps(share) >= FEWEST else []),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse(Plan, argv, default=None, description=__doc__)
    with errors_for_people():
        print("\n".join(plan(config)))


if __name__ == "__main__":
    main()
