"""How a machine would train a recipe: batch and memory, time, and the largest recipe for some hours."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.config import CONFIGS, read_yaml
from ldm.planning.cost import Cost, dry_run, time_step
from ldm.planning.device import GIB, format_bytes, total_memory
from ldm.stages import STAGES, CLIPStage, DiffusionStage, VAEStage
from ldm.text import TextEncoder, combine_encoders
from ldm.training.config import TrainingConfig
from ldm.training.stage import Stage
from ldm.vae import VAE

MEMORY_FRACTION = 0.9  # of the memory, that is used
RUNTIME_OVERHEAD_BYTES = GIB  # that Python, or CUDA, needs for itself
SKIP_FACTOR = 4  # a recipe that looks this many times too long, by its FLOP, is not measured
MAX_SIZE_FACTOR = 2  # a recipe is used at resolutions up to this factor from its own


# Recipes.


class StageEstimate(NamedTuple):
    """One stage of a recipe, with random weights on random images."""

    stage: str
    file: Path
    config: TrainingConfig  # at the planned resolution
    build: Callable[[bool, torch.device], Stage]  # with gradient checkpointing or without
    latent_bytes: int = 0  # of an image, in memory, where the recipe caches latents

    def cost_per_image(self, *, bf16: bool) -> Cost:
        """Of a step of one image, as the recipe has it."""
        return cost(self, 1, self.config.gradient_checkpointing, bf16)


@cache
def cost(estimate: StageEstimate, images: int, gradient_checkpointing: bool, bf16: bool) -> Cost:
    """Of a step of one rank."""
    return dry_run(partial(estimate.build, gradient_checkpointing), images, bf16=bf16)


def read_recipe(file: Path) -> Any:
    """The configuration of the stage that a file is named after."""
    return STAGES[file.stem].Config.from_dict(read_yaml(file), source=str(file))


def recipes(resolution: int, max_latent_bytes: float = math.inf) -> dict[str, list[StageEstimate]]:
    """The stages of each folder of configs/ that can be used at a resolution, see `recipe_stages`. ValueError: none."""
    found, refused = {}, []
    for file in sorted(CONFIGS.glob("*/ldm.yaml")):
        own, name = read_recipe(file).data.resolution, file.parent.name
        if own / MAX_SIZE_FACTOR <= resolution <= own * MAX_SIZE_FACTOR:
            try:
                found[name] = recipe_stages(file.parent, resolution, max_latent_bytes)
            except ValueError as error:
                refused.append(f"configs/{name}: {error}")
    if not found:
        reason = "; ".join(refused) or "no recipe of configs/ is near"
        raise ValueError(f"--size {resolution}: {reason}; 32, 64, 128, 256, 512, 768 and 1024 have some")
    return found


def recipe_stages(folder: Path, resolution: int, max_latent_bytes: float = math.inf) -> list[StageEstimate]:
    """The stages of a recipe at another resolution; one that has no clip.yaml uses a published text tower.

    Latents are cached in memory where the recipe does so and those of an image need at most so many bytes. A VAE that
    is not trained at the resolution of the U-Net stays at its own.
    """
    configs = {name: read_recipe(file) for name in STAGES if (file := folder / f"{name}.yaml").is_file()}
    own = configs["ldm"].data.resolution
    for name, config in configs.items():
        if config.data.resolution == own:
            data = config.data.model_copy(update={"resolution": resolution})
            configs[name] = config.model_copy(update={"data": data})
    architecture = configs["clip"].clip.architecture(resolution) if "clip" in configs else None
    ldm, vae = configs["ldm"], configs["vae"].vae
    side = vae.latent_size(resolution)
    if side % ldm.unet.factor:
        raise ValueError(f"resolution {resolution} is not a multiple of {vae.factor * ldm.unet.factor}")
    latent_bytes = 8 * ldm.unet.in_channels * side**2 if ldm.cache_latents else 0  # mean and log-variance, float32
    if latent_bytes > max_latent_bytes:
        configs["ldm"] = ldm.model_copy(update={"cache_latents": False})

    def build(name: str, gradient_checkpointing: bool, device: torch.device) -> Stage:
        config = configs[name].model_copy(update={"gradient_checkpointing": gradient_checkpointing})
        if name == "clip":
            return CLIPStage(config)
        if name == "vae":
            return VAEStage(config)
        towers = [tower for tower in (config.text, config.second_text) if tower.model != "none"]
        text = combine_encoders([TextEncoder.random(tower, architecture) for tower in towers])
        return DiffusionStage(config, VAE(vae).requires_grad_(False).eval(), text, device)

    return [
        StageEstimate(name, folder / f"{name}.yaml", config, partial(build, name), latent_bytes * (name == "ldm"))
        for name, config in configs.items()
    ]


# Plans.


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


@dataclass(frozen=True)
class StagePlan:
    """A stage as a machine trains it."""

    estimate: StageEstimate
    machine: MachineSpec
    gradient_checkpointing: bool
    fsdp: bool
    micro_batch: int  # images on one rank
    batch: int  # images in a step

    @property
    def cost(self) -> Cost:
        """Of a micro-batch on one rank."""
        return cost(self.estimate, self.micro_batch, self.gradient_checkpointing, self.machine.bf16)

    @property
    def memory(self) -> int:
        """Bytes on each rank."""
        return self.cost.memory(self.machine.ranks, fsdp=self.fsdp)

    @cached_property
    def rate(self) -> float:
        """Images/s of all ranks: from the TFLOP/s that were given, or measured when it is first asked for."""
        machine = self.machine
        if machine.device is None:
            seconds = self.cost.flop / (1e12 * (machine.tflops or math.nan))
        else:
            build = partial(self.estimate.build, self.gradient_checkpointing)
            seconds = time_step(build, self.micro_batch, machine.device, bf16=machine.bf16)
        return machine.ranks * self.micro_batch / seconds

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches in a step."""
        return -(-self.batch // (self.micro_batch * self.machine.ranks))

    @property
    def seconds(self) -> float:
        """Of the recipe's own steps."""
        return self.estimate.config.steps * self.batch / self.rate

    def steps(self, fraction: float) -> int:
        """A fraction of the recipe's own steps."""
        return max(1, round(fraction * self.estimate.config.steps))


def fit_to_memory(estimate: StageEstimate, machine: MachineSpec) -> StagePlan:
    """The largest micro-batch that fits, with gradient checkpointing, then FSDP, where not one image fits without.

    The contrastive loss of CLIP compares a whole batch: its batch gets smaller, and nothing else can be done for it.
    ValueError where nothing fits.
    """
    ranks, unsplittable = machine.ranks, estimate.stage == "clip"
    own = max(1, round(estimate.config.batch_size / ranks))
    divisors = [images for images in range(own, 0, -1) if own % images == 0]
    savers = [(estimate.config.gradient_checkpointing, False), (True, False), (True, True)]
    for gradient_checkpointing, fsdp in savers[: 1 if unsplittable else 3 if ranks > 1 else 2]:
        plan = partial(StagePlan, estimate, machine, gradient_checkpointing, fsdp)
        plans = [plan(images, (images if unsplittable else own) * ranks) for images in divisors]
        if plans[-1].memory <= machine.usable_bytes:
            return next(plan for plan in plans if plan.memory <= machine.usable_bytes)
    needed, usable = format_bytes(plans[-1].memory), format_bytes(machine.usable_bytes)
    raise ValueError(f"{estimate.file}: one image needs {needed}, {usable} are usable")


def choose_recipe(found: dict[str, list[StageEstimate]], machine: MachineSpec, hours: float) -> list[StagePlan]:
    """The largest recipe, by its FLOP, whose own steps fit in the hours; the smallest, where none does.

    ValueError when not even that one fits in the memory.
    """
    flop = partial(recipe_flop, bf16=machine.bf16)
    best, *larger = sorted(found.values(), key=flop)
    plans = [fit_to_memory(estimate, machine) for estimate in best]
    for stages in larger:
        if total_hours(plans) * flop(stages) / flop(best) > SKIP_FACTOR * hours:
            break
        try:
            larger_plans = [fit_to_memory(estimate, machine) for estimate in stages]
        except ValueError:
            break
        if total_hours(larger_plans) > hours:
            break
        best, plans = stages, larger_plans
    return plans


def recipe_flop(stages: list[StageEstimate], *, bf16: bool) -> int:
    """Of all steps of a recipe."""
    return sum(s.config.steps * s.config.batch_size * s.cost_per_image(bf16=bf16).flop for s in stages)


def total_hours(plans: list[StagePlan]) -> float:
    """Of the recipe's own steps, all stages."""
    return sum(plan.seconds for plan in plans) / 3600
