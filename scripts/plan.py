"""Choose a recipe for some images, a machine and some hours, and tell batch, memory, time and the commands.

Memory comes from a dry run of each network; times from a few real steps on this machine, or from --tflops.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import train_clip
import train_ldm
import train_vae
from pydantic import Field
from torch import Tensor, nn

from ldm.config import ScriptConfig, errors_for_people, parse, read_yaml
from ldm.text import TextConfig
from ldm.text.contrastive import CLIP, clip_loss
from ldm.text.encoder import TextTower
from ldm.training.budget import TIMED, Build, Cost, Loss, dry_run, largest_batch, seconds_of_step
from ldm.training.loop import TrainingConfig
from ldm.training.machine import GIB, in_bytes, in_time, total_memory
from ldm.unet import UNet
from ldm.unet.model import SIZES
from ldm.vae import VAE
from ldm.vae.losses import ssim, vae_loss

ROOT = Path(__file__).parents[1]
NEAR = 2  # a recipe is taken at sizes up to this factor from its own
FULL, ITSELF = 0.9, GIB  # share of the memory that is used; bytes that Python, or CUDA, need for themselves
FAR = 4  # a recipe that looks this many times too long, by its FLOP, is not measured


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
    tflops: float | None = Field(None, gt=0)
    """TFLOP/s that training reaches on each GPU, for another machine than this one; left out: measured here"""
    source: str = "FOLDER"
    """where the images are, for the commands"""
    run: Path = Path("runs/plan")
    """where the runs will be, for the commands"""


class Machine(NamedTuple):
    """What is planned for."""

    gpus: int
    room: int  # bytes for training, in each process
    device: torch.device | None  # where steps are measured; None: nowhere
    tflops: float | None

    @property
    def processes(self) -> int:
        return max(self.gpus, 1)


class Job(NamedTuple):
    """One stage of a recipe, its network with random weights and its loss on random images."""

    stage: str
    file: Path
    config: TrainingConfig
    size: int
    build: Callable[[bool], nn.Module]  # with gradient checkpointing or without
    loss: Loss
    kept: int = 0  # bytes of an image that are kept in memory, its latents


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


class Recipe(NamedTuple):
    """The stages of a folder of configs/."""

    name: str
    jobs: list[Job]

    def flop(self, *, bf16: bool) -> float:
        """Of all its steps."""
        each = (job.config.steps * job.config.batch_size * own_cost(job, bf16=bf16).flop for job in self.jobs)
        return float(sum(each))


# What is trained in each stage.


def jobs_of(folder: Path, size: int) -> list[Job]:
    """The stages of a recipe at another size; one that has no clip.yaml takes a published text tower."""
    ldm = read(train_ldm.TrainLDM, folder / "ldm.yaml")
    vae = read(train_vae.TrainVAE, folder / "vae.yaml")
    clip = read(train_clip.TrainCLIP, folder / "clip.yaml") if (folder / "clip.yaml").is_file() else None
    vae_size = size if vae.data.size == ldm.data.size else vae.data.size
    jobs = [] if clip is None else [clip_job(folder, clip, size)]
    return [*jobs, vae_job(folder, vae, vae_size), ldm_job(folder, ldm, vae, clip, size)]


def read(settings: Any, path: Path) -> Any:
    """The configuration of a stage."""
    return settings.from_dict(read_yaml(path), source=str(path))


def clip_job(folder: Path, config: train_clip.TrainCLIP, size: int) -> Job:
    """Both towers, under the contrastive loss."""
    criterion = clip_loss(rank=0, world=1)

    def loss(module: nn.Module, images: int, device: torch.device) -> Tensor:
        ids = torch.ones(images, config.clip.context_length, dtype=torch.long, device=device)
        return criterion(**module(torch.rand(images, config.data.channels, size, size, device=device), ids))

    architecture = config.clip.architecture(size)
    return Job("clip", folder / "clip.yaml", config, size, lambda recompute: CLIP(architecture), loss)


def vae_job(folder: Path, config: train_vae.TrainVAE, size: int) -> Job:
    """Encoder and decoder."""
    side = config.vae.latent_size(size)
    ssim(*torch.zeros(2, 1, 1, size, size))  # it keeps its window, which must not be one of a dry run

    def loss(module: nn.Module, images: int, device: torch.device) -> Tensor:
        pixels = torch.rand(images, config.data.channels, size, size, device=device)
        noise = torch.randn(images, config.vae.latent_channels, side, side, device=device)
        output, posterior = module(pixels, noise)
        return vae_loss(pixels, output, posterior, config.loss)["loss"]

    def build(recompute: bool) -> nn.Module:
        return VAE(config.vae, gradient_checkpointing=recompute)

    return Job("vae", folder / "vae.yaml", config, size, build, loss)


def ldm_job(
    folder: Path, config: train_ldm.TrainLDM, vae: train_vae.TrainVAE, clip: train_clip.TrainCLIP | None, size: int
) -> Job:
    """The U-Net, with the frozen VAE (unless latents are kept) and the frozen text towers before it."""
    side, unet = vae.vae.latent_size(size), config.unet
    if side % unet.factor:
        raise ValueError(f"a size of {size} is not a multiple of {vae.vae.factor * unet.factor}")
    towers = [tower for tower in (config.text, config.second_text) if tower.model != "none"]

    def loss(module: Any, images: int, device: torch.device) -> Tensor:
        z = torch.randn(images, unet.in_channels, side, side, device=device)
        with torch.no_grad():
            if not config.cache_latents:
                z = module.vae.encode(torch.rand(images, config.data.channels, size, size, device=device)).mean
            ids = torch.ones(images, module.text[0].length, dtype=torch.long, device=device)
            states = [tower(ids, layer=one.layer) for tower, one in zip(module.text, towers, strict=True)]
        context = torch.cat([one.tokens for one in states], -1)
        vector = states[-1].pooled if unet.vector_width else None
        sizes = torch.ones(images, SIZES, device=device) if unet.size_width else None
        answer = module.unet(z, torch.rand(images, device=device), context, states[0].mask, vector, sizes)
        return (answer.float() - z).square().mean()

    def build(recompute: bool) -> nn.Module:
        text = nn.ModuleList(tower_of(tower, clip, size) for tower in towers)
        parts = {"vae": VAE(vae.vae), "text": text.eval()}
        module = nn.ModuleDict(parts).requires_grad_(False)
        module["unet"] = UNet(unet, gradient_checkpointing=recompute)
        return module

    kept = 8 * unet.in_channels * side**2 if config.cache_latents else 0  # mean and log-variance
    return Job("ldm", folder / "ldm.yaml", config, size, build, loss, kept)


def tower_of(text: TextConfig, clip: train_clip.TrainCLIP | None, size: int) -> TextTower:
    """A text tower with random weights: one that open_clip has the name of, or that of the recipe."""
    config = clip.clip.architecture(size) if clip else open_clip.get_model_config(text.model)
    tower = TextTower(config)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.02)
    return tower


# The choice.


def machine_of(config: Plan) -> Machine:
    """What is planned for. Steps are measured here where this machine has what the other has, unless --tflops is given.

    ValueError when its memory is not known.
    """
    gpus = torch.cuda.device_count() if config.gpus is None else config.gpus
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    same = (gpus > 0) == (here.type == "cuda")
    if config.memory_gib is None and not same:
        raise ValueError("--memory-gib: say what the other machine has, in each GPU or where it has none in all")
    memory = int(config.memory_gib * GIB) if config.memory_gib else total_memory(here)
    measured = same and config.tflops is None and memory <= 1.05 * total_memory(here)
    return Machine(gpus, int(FULL * memory) - ITSELF, here if measured else None, config.tflops)


def recipes(size: int) -> list[Recipe]:
    """Those of configs/ that can be taken at a size; ValueError when there is none."""
    found = []
    for file in sorted((ROOT / "configs").glob("*/ldm.yaml")):
        own = read(train_ldm.TrainLDM, file).data.size
        if own / NEAR <= size <= own * NEAR:
            found.append(Recipe(file.parent.name, jobs_of(file.parent, size)))
    if not found:
        raise ValueError(f"--size {size}: no recipe of configs/ is near; 32, 64, 128, 256, 512, 768 and 1024 have some")
    return found


@cache
def cost(job: Job, images: int, recompute: bool, bf16: bool) -> Cost:
    """Of a step of one process."""
    return dry_run(lambda: job.build(recompute), job.loss, images, bf16=bf16)


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
    for recompute, split in ways if processes > 1 else ways[:2]:

        def memory(images: int, recompute: bool = recompute, split: bool = split) -> int:
            return cost(job, images, recompute, bf16).memory(processes, split=split)

        images = largest_batch(memory, machine.room, share)
        if images:
            one = share if job.stage != "clip" else images  # the contrastive loss takes no micro-batches
            batch = one * processes
            parameters = own_cost(job, bf16=bf16).parameters
            return Row(job, parameters, recompute, split, images, batch, memory(images), processes, math.inf)
    raise ValueError(f"{job.file}: one image needs {in_bytes(memory(1))}, there is room for {in_bytes(machine.room)}")


def timed(row: Row, machine: Machine) -> Row:
    """With its rate: measured, or from the TFLOP/s that were given."""
    if machine.device is None:
        flop = cost(row.job, row.images, row.recompute, machine.gpus > 0).flop
        seconds = flop / (1e12 * (machine.tflops or math.nan))
    else:
        build: Build = lambda: row.job.build(row.recompute)  # noqa: E731
        seconds = seconds_of_step(build, row.job.loss, row.images, machine.device, bf16=machine.gpus > 0)
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


# What is told.


def needs(found: list[Recipe], machine: Machine, hours: float) -> list[str]:
    """What each recipe asks of a machine whose rate is not known."""
    lines = [f"{'recipe':12}  {'GFLOP/image':>11}  {'memory from':>11}  {'TFLOP/s a GPU needed':>20}"]
    for recipe in found:
        last = own_cost(recipe.jobs[-1], bf16=True)
        rate = recipe.flop(bf16=True) / (hours * 3600 * machine.processes) / 1e12
        lines.append(
            f"{recipe.name:12}  {last.flop / 1e9:>11,.1f}  {in_bytes(last.memory() + ITSELF):>11}  {rate:>20.3g}"
        )
    return lines


def table(rows: list[Row], share: float, images: int) -> list[str]:
    """What each stage is and takes."""
    heads = ("stage", "parameters", "batch", "memory", "images/s", "steps", "epochs", "time")
    cells = [heads]
    for row in rows:
        steps = steps_of(row, share)
        told = f"{row.batch} = {accumulate(row)} x {row.batch // accumulate(row)}"
        numbers = (
            in_bytes(row.memory + ITSELF),
            f"{row.rate:,.1f}",
            f"{steps:,}",
            f"{steps * row.batch / images:,.1f}",
        )
        cells.append((row.job.stage, f"{row.parameters:,}", told, *numbers, in_time(share * row.seconds)))
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def steps_of(row: Row, share: float) -> int:
    """The recipe's, or what of them fits."""
    return max(1, round(share * row.job.config.steps))


def accumulate(row: Row) -> int:
    """Micro-batches in a step."""
    return -(-row.batch // (row.images * row.processes))


def command(row: Row, share: float, config: Plan, machine: Machine) -> str:
    """What trains a stage."""
    launch = "accelerate launch"
    if machine.gpus:
        launch += " --mixed_precision bf16" + f" --multi_gpu --num_processes {machine.gpus}" * (machine.gpus > 1)
    job, steps = row.job, steps_of(row, share)
    flags: dict[str, object] = {"data.source": config.source, "data.size": job.size, "run": config.run / job.stage}
    wanted = {"steps": steps, "batch_size": row.batch, "accumulate": accumulate(row)}
    wanted["warmup"] = min(job.config.warmup, steps // 10)
    flags |= {name.replace("_", "-"): n for name, n in wanted.items() if n != getattr(job.config, name)}
    told = " ".join(f"--{name} {value}" for name, value in flags.items())
    told += " --gradient-checkpointing" * (row.recompute and not job.config.gradient_checkpointing)
    told += " --shard" * row.split
    return f"{launch} scripts/train_{job.stage}.py --config {job.file.relative_to(ROOT)} {told}"


def plan(config: Plan) -> list[str]:
    """What is said of it."""
    machine, found = machine_of(config), recipes(config.size)
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
    kept = config.images * rows[-1].job.kept
    latents = [f"latents: all in the memory of the machine, {in_bytes(kept)} for each process"] if kept else []
    return [
        asked,
        f"configs/{recipe.name}, of {', '.join(one.name for one in found)}: {rest}",
        "",
        *table(rows, share, config.images),
        "",
        "batch = micro-batches x images in each, over all processes",
        f"memory: of each process, from a dry run, and {in_bytes(ITSELF)} for Python or CUDA itself",
        *latents,
        f"images/s: {where}, without loading data and traffic between GPUs; the doctor measures all of it",
        "",
        *(command(row, share, config, machine) for row in rows),
        command(rows[-1], share, config, machine).replace("train_ldm.py", "doctor.py ldm"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse(Plan, argv, default=None, description=__doc__)
    with errors_for_people():
        print("\n".join(plan(config)))


if __name__ == "__main__":
    main()
