"""How a machine would train a recipe: batch and memory, time, and the largest recipe for some hours."""

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.config import CONFIGS, read_yaml
from ldm.planning.cost import Cost, dry_run, largest_batch, time_step
from ldm.planning.device import GIB, format_bytes, total_memory
from ldm.stages import CLIPStage, DiffusionStage, VAEStage
from ldm.text import TextEncoder, combine_encoders
from ldm.training.config import TrainingConfig
from ldm.training.stage import Stage
from ldm.vae import VAE

MEMORY_FRACTION = 0.9  # of the memory, that is used
RUNTIME_OVERHEAD_BYTES = GIB  # that Python, or CUDA, needs for itself
SKIP_FACTOR = 4  # a recipe that looks this many times too long, by its FLOP, is not measured
MAX_SIZE_FACTOR = 2  # a recipe is used at resolutions up to this factor from its own


class MachineSpec(NamedTuple):
    """What is planned for."""

    gpus: int
    usable_bytes: int  # for training, on each rank
    device: torch.device | None  # where steps are measured; None: nowhere
    tflops: float | None  # that training reaches on each GPU, where it is known

    @property
    def ranks(self) -> int:
        """One for each GPU, or one on the CPU."""
        return max(self.gpus, 1)

    @property
    def bf16(self) -> bool:
        """Whether training runs in bf16."""
        return self.gpus > 0


class StageEstimate(NamedTuple):
    """One stage of a recipe, with random weights on random images."""

    stage: str
    file: Path
    config: TrainingConfig
    resolution: int
    build: Callable[[bool, torch.device], Stage]  # with gradient checkpointing or without
    latent_cache_bytes: int = 0  # of an image, in memory
    flags: str = ""  # additional ones of its command
    unsplittable: bool = False  # no micro-batches, no gradient checkpointing, no --fsdp


class Recipe(NamedTuple):
    """The stages of a folder of configs/."""

    name: str
    stages: list[StageEstimate]

    def flop(self, *, bf16: bool) -> float:
        """Of all its steps."""
        return float(sum(s.config.steps * s.config.batch_size * cost_per_image(s, bf16=bf16).flop for s in self.stages))


class StagePlan(NamedTuple):
    """A stage as a machine trains it."""

    estimate: StageEstimate
    parameters: int
    gradient_checkpointing: bool
    fsdp: bool
    micro_batch: int  # images on one rank
    batch: int  # images in a step
    memory: int  # bytes on each rank
    ranks: int
    rate: float  # images/s of all ranks

    @property
    def seconds(self) -> float:
        """Of the recipe's own steps."""
        return self.estimate.config.steps * self.batch / self.rate

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches in a step."""
        return -(-self.batch // (self.micro_batch * self.ranks))

    def steps(self, fraction: float) -> int:
        """A fraction of the recipe's own steps."""
        return max(1, round(fraction * self.estimate.config.steps))


# Recipes.


def recipes(resolution: int, max_latent_bytes: float = math.inf) -> list[Recipe]:
    """Those of configs/ that can be used at a resolution; the rest as in `recipe_stages`. ValueError: none."""
    found, refused = [], []
    for file in sorted(CONFIGS.glob("*/ldm.yaml")):
        own = _read(DiffusionStage.Config, file).data.resolution
        if own / MAX_SIZE_FACTOR <= resolution <= own * MAX_SIZE_FACTOR:
            try:
                found.append(Recipe(file.parent.name, recipe_stages(file.parent, resolution, max_latent_bytes)))
            except ValueError as error:
                refused.append(f"configs/{file.parent.name}: {error}")
    if not found:
        reason = "; ".join(refused) or "no recipe of configs/ is near"
        raise ValueError(f"--size {resolution}: {reason}; 32, 64, 128, 256, 512, 768 and 1024 have some")
    return found


def recipe_stages(folder: Path, resolution: int, max_latent_bytes: float = math.inf) -> list[StageEstimate]:
    """The stages of a recipe at another resolution; one that has no clip.yaml uses a published text tower.

    Latents are cached in memory where the recipe does so and those of an image need at most so many bytes.
    """
    files = {stage: folder / f"{stage}.yaml" for stage in ("clip", "vae", "ldm")}
    ldm, vae = _read(DiffusionStage.Config, files["ldm"]), _read(VAEStage.Config, files["vae"])
    same = vae.data.resolution == ldm.data.resolution
    ldm = _with_data(ldm, resolution=resolution)
    vae = _with_data(vae, resolution=resolution if same else vae.data.resolution, channels=ldm.data.channels)
    estimates, clip_architecture = [], None
    if files["clip"].is_file():
        clip = _with_data(_read(CLIPStage.Config, files["clip"]), resolution=resolution, channels=ldm.data.channels)
        clip_architecture = clip.clip.architecture(resolution)
        build = partial(_build, CLIPStage, clip)
        estimates.append(StageEstimate("clip", files["clip"], clip, resolution, build, unsplittable=True))
    vae.vae.latent_size(vae.data.resolution)
    build = partial(_build, VAEStage, vae)
    estimates.append(StageEstimate("vae", files["vae"], vae, vae.data.resolution, build))
    side = vae.vae.latent_size(resolution)
    if side % ldm.unet.factor:
        raise ValueError(f"resolution {resolution} is not a multiple of {vae.vae.factor * ldm.unet.factor}")
    latent_bytes = 8 * ldm.unet.in_channels * side**2 if ldm.cache_latents else 0  # mean and log-variance, float32
    flags = "" if latent_bytes <= max_latent_bytes else " --no-cache-latents"
    ldm = ldm.model_copy(update={"cache_latents": ldm.cache_latents and not flags})

    def build_ldm(gradient_checkpointing: bool, device: torch.device) -> Stage:
        config = ldm.model_copy(update={"gradient_checkpointing": gradient_checkpointing})
        towers = [tower for tower in (ldm.text, ldm.second_text) if tower.model != "none"]
        text = combine_encoders([TextEncoder.random(tower, clip_architecture) for tower in towers])
        return DiffusionStage(config, VAE(vae.vae).requires_grad_(False).eval(), text, device)

    ldm_estimate = StageEstimate("ldm", files["ldm"], ldm, resolution, build_ldm, latent_bytes, flags)
    return [*estimates, ldm_estimate]


def _build(stage_class: Any, config: Any, gradient_checkpointing: bool, device: torch.device) -> Stage:
    stage: Stage = stage_class(config.model_copy(update={"gradient_checkpointing": gradient_checkpointing}))
    return stage


def _read(cls: Any, path: Path) -> Any:
    return cls.from_dict(read_yaml(path), source=str(path))


def _with_data(config: Any, **values: Any) -> Any:
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


# Machines.


def detect_machine(gpus: int | None, memory_gib: float | None, tflops: float | None) -> MachineSpec:
    """What is planned for; None: as on this machine.

    Steps are measured here where this machine has what the other has, unless TFLOP/s are given. ValueError when its
    memory is not known.
    """
    gpus = torch.cuda.device_count() if gpus is None else gpus
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    same = (gpus > 0) == (here.type == "cuda")
    if memory_gib is None and not same:
        raise ValueError("--memory-gib: pass what the other machine has, in each GPU, or in all without one")
    memory = int(memory_gib * GIB) if memory_gib else total_memory(here)
    measured = same and tflops is None and memory <= 1.05 * total_memory(here)
    usable = max(0, int(MEMORY_FRACTION * memory) - RUNTIME_OVERHEAD_BYTES)
    return MachineSpec(gpus, usable, here if measured else None, tflops)


# Plans.


@cache
def cost(estimate: StageEstimate, images: int, gradient_checkpointing: bool, bf16: bool) -> Cost:
    """Of a step of one rank."""
    return dry_run(partial(estimate.build, gradient_checkpointing), images, bf16=bf16)


def cost_per_image(estimate: StageEstimate, *, bf16: bool) -> Cost:
    """Of a step of one image, as the recipe has it."""
    return cost(estimate, 1, estimate.config.gradient_checkpointing, bf16)


def fit_to_memory(estimate: StageEstimate, machine: MachineSpec) -> StagePlan:
    """The largest micro-batch that fits, with what saves memory where nothing fits without; its rate comes later.

    ValueError where nothing fits.
    """
    own = max(1, round(estimate.config.batch_size / machine.ranks))
    for gradient_checkpointing, fsdp in _memory_savers(estimate, machine):
        memory = partial(_memory, estimate, machine, gradient_checkpointing, fsdp)
        if images := largest_batch(memory, machine.usable_bytes, own):
            batch = (images if estimate.unsplittable else own) * machine.ranks
            parameters = cost_per_image(estimate, bf16=machine.bf16).parameters
            settings = (parameters, gradient_checkpointing, fsdp, images, batch, memory(images), machine.ranks)
            return StagePlan(estimate, *settings, rate=math.inf)
    raise ValueError(
        f"{estimate.file}: one image needs {format_bytes(memory(1))}, {format_bytes(machine.usable_bytes)} are usable"
    )


def _memory_savers(estimate: StageEstimate, machine: MachineSpec) -> list[tuple[bool, bool]]:
    """Gradient checkpointing and FSDP, from what is fastest to what needs least memory."""
    own = (estimate.config.gradient_checkpointing, False)
    if estimate.unsplittable:
        return [own]
    return [own, (True, False), (True, True)] if machine.ranks > 1 else [own, (True, False)]


def _memory(
    estimate: StageEstimate, machine: MachineSpec, gradient_checkpointing: bool, fsdp: bool, images: int
) -> int:
    return cost(estimate, images, gradient_checkpointing, machine.bf16).memory(machine.ranks, fsdp=fsdp)


def measure(plan: StagePlan, machine: MachineSpec) -> StagePlan:
    """With its rate: measured, or from the TFLOP/s that were given."""
    if machine.device is None:
        flop = cost(plan.estimate, plan.micro_batch, plan.gradient_checkpointing, machine.bf16).flop
        seconds = flop / (1e12 * (machine.tflops or math.nan))
    else:
        build = partial(plan.estimate.build, plan.gradient_checkpointing)
        seconds = time_step(build, plan.micro_batch, machine.device, bf16=machine.bf16)
    return plan._replace(rate=machine.ranks * plan.micro_batch / seconds)


def choose_recipe(found: list[Recipe], machine: MachineSpec, hours: float) -> tuple[Recipe, list[StagePlan]]:
    """The largest recipe, by its FLOP, whose own steps fit in the hours; the smallest, where none does.

    ValueError when not even that one fits in the memory.
    """
    best: tuple[Recipe, list[StagePlan]] | None = None
    for recipe in sorted(found, key=lambda one: one.flop(bf16=machine.bf16)):
        if best:
            growth = recipe.flop(bf16=machine.bf16) / best[0].flop(bf16=machine.bf16)
            if total_hours(best[1]) * growth > SKIP_FACTOR * hours:
                break
        try:
            plans = [measure(fit_to_memory(estimate, machine), machine) for estimate in recipe.stages]
        except ValueError:
            if best is None:
                raise
            break
        if best and total_hours(plans) > hours:
            break
        best = recipe, plans
    assert best is not None
    return best


def total_hours(plans: list[StagePlan]) -> float:
    """Of the recipe's own steps, all stages."""
    return sum(plan.seconds for plan in plans) / 3600
