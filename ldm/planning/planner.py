"""How a machine would train a recipe: batch and memory, time, and the largest recipe for some hours."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.config import CONFIGS, read_yaml
from ldm.data.batch_sampler import fitting_batch_size
from ldm.data.config import DataConfig
from ldm.data.sources.base import HELD_OUT_FRACTION
from ldm.planning.cost import STATE_BYTES_PER_PARAMETER, Build, Cost, dry_run, time_step
from ldm.planning.device import GIB, format_bytes, total_memory
from ldm.stages import STAGES, CLIPStage, DiffusionStage, VAEStage
from ldm.text import TextEncoder, combine_encoders
from ldm.text.image_tower import ImageTower
from ldm.text.weights import public_architecture
from ldm.training.config import TrainingConfig
from ldm.training.stage import Stage
from ldm.vae import VAE

MEMORY_FRACTION = 0.9  # of the memory, that is used
RUNTIME_OVERHEAD_BYTES = GIB  # that Python, or CUDA, needs for itself
SKIP_FACTOR = 4  # a recipe that looks this many times too long, by its FLOP, is not measured
MAX_SIZE_FACTOR = 2  # a recipe is used at resolutions up to this factor from its own
UNPLANNED = ("exportable",)  # recipes that are chosen for the formats of other tools, not for what a machine can train
LATENT_CACHE_FRACTION = 0.25  # of a rank's memory, for the latents of all images


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


def detect_machine(gpus: int | None, memory_gib: float | None, tflops: float | None) -> MachineSpec:
    """What is planned for; None: as on this machine. ValueError when the memory of another one is not given."""
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
    """A stage of a recipe on a machine: all that is planned is in its configuration."""

    file: Path  # of the recipe
    config: TrainingConfig
    build: Build
    machine: MachineSpec
    latent_bytes: int  # of an image, in memory, where latents are cached: with the features that are aligned to

    def update(self, **values: Any) -> "StagePlan":
        """With other values in its configuration."""
        return replace(self, config=self.config.model_copy(update=values))

    def shorten(self, fraction: float) -> "StagePlan":
        """With a fraction of its steps."""
        steps = max(1, round(fraction * self.config.steps))
        return self.update(steps=steps, warmup_steps=min(self.config.warmup_steps, steps // 10))

    @property
    def micro_batch(self) -> int:
        """Images on one rank."""
        return self.config.batch_size // (self.config.grad_accum_steps * self.machine.ranks)

    def cost(self, images: int) -> Cost:
        """Of a step of some images on one rank."""
        return dry_run(self.build, images, self.config.gradient_checkpointing, bf16=self.machine.gpus > 0)

    @property
    def memory(self) -> int:
        """Bytes on each rank; on a CPU with the copy that is written as a checkpoint while training goes on."""
        cost, accumulates = self.cost(self.micro_batch), self.config.grad_accum_steps > 1
        written = 0 if self.machine.gpus else STATE_BYTES_PER_PARAMETER * cost.parameters
        return written + cost.memory(self.machine.ranks, fsdp=self.config.fsdp, accumulates=accumulates)

    @property
    def rate(self) -> float:
        """Images/s of all ranks: measured, or from the TFLOP/s that were given."""
        machine, images = self.machine, self.micro_batch
        if machine.device is None:
            seconds = self.cost(images).flop / (1e12 * (machine.tflops or math.nan))
        else:
            recompute = self.config.gradient_checkpointing
            seconds = time_step(self.build, images, recompute, machine.device, bf16=machine.gpus > 0)
        return machine.ranks * images / seconds

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.config.steps * self.config.batch_size / self.rate


Recipe = list[StagePlan]


def recipe_flop(recipe: Recipe) -> int:
    """Of all steps of all stages."""
    return sum(plan.config.steps * plan.config.batch_size * plan.cost(1).flop for plan in recipe)


def recipe_hours(recipe: Recipe) -> float:
    """Of all steps of all stages."""
    return sum(plan.seconds for plan in recipe) / 3600


# Recipes.


def recipes(resolution: int, machine: MachineSpec, num_images: int, source: str) -> dict[str, Recipe]:
    """The recipes of configs/ that can be used for a source at a resolution, as they are. ValueError: none.

    Those of drawn images are for these alone.
    """
    found, refused, source = {}, [], "shapes" if source == "pairs" else source
    is_drawn = DataConfig(source=source).drawn is not None
    for file in sorted(CONFIGS.glob("*/ldm.yaml")):
        data, name = read_recipe(file).data, file.parent.name
        if name in UNPLANNED:
            continue
        own, fits = data.resolution, data.source == source or not (is_drawn or data.drawn)
        if own / MAX_SIZE_FACTOR <= resolution <= own * MAX_SIZE_FACTOR and fits:
            try:
                found[name] = recipe_stages(file.parent, resolution, machine, num_images)
            except ValueError as error:
                refused.append(f"configs/{name}: {error}")
    if not found:
        reason = "; ".join(refused) or "no recipe of configs/ is near"
        raise ValueError(f"--size {resolution}: {reason}; 32, 64, 128, 256, 512, 768 and 1024 have some")
    return found


def read_recipe(file: Path) -> Any:
    """The configuration of the stage that a file is named after."""
    return STAGES[file.stem].Config.from_dict(read_yaml(file), source=str(file))


def recipe_stages(folder: Path, resolution: int, machine: MachineSpec, num_images: int) -> Recipe:
    """The stages of a recipe at another resolution; one that has no clip.yaml uses a published text tower.

    Latents are cached in memory where the recipe does so and those of all images fit. A VAE that is not trained at the
    resolution of the U-Net stays at its own. A batch has no more images than there are to train on.
    """
    configs = {name: read_recipe(file) for name in STAGES if (file := folder / f"{name}.yaml").is_file()}
    own, largest = configs["ldm"].data.resolution, fitting_batch_size(math.ceil((1 - HELD_OUT_FRACTION) * num_images))
    for name, config in configs.items():
        data = config.data.model_copy(update={"resolution": resolution} if config.data.resolution == own else {})
        configs[name] = config.model_copy(update={"data": data, "batch_size": min(config.batch_size, largest)})
    architecture = configs["clip"].clip.architecture(resolution) if "clip" in configs else None
    ldm, vae = configs["ldm"], configs["vae"].vae
    aligned_to = None
    if ldm.align_weight:
        aligned_to = architecture or public_architecture(ldm.text.model, kind="image")
    side = vae.latent_size(resolution)
    if side % ldm.unet.factor:
        raise ValueError(f"resolution {resolution} is not a multiple of {vae.factor * ldm.unet.factor}")
    latent_bytes = 8 * ldm.unet.in_channels * side**2 if ldm.cache_latents else 0  # mean and log-variance, float32
    if latent_bytes and aligned_to:
        latent_bytes += 4 * num_features(aligned_to)
    if latent_bytes * num_images > LATENT_CACHE_FRACTION * machine.usable_bytes:
        configs["ldm"] = ldm.model_copy(update={"cache_latents": False})

    def build(name: str, gradient_checkpointing: bool, device: torch.device) -> Stage:
        config = configs[name].model_copy(update={"gradient_checkpointing": gradient_checkpointing})
        if name == "clip":
            return CLIPStage(config)
        if name == "vae":
            return VAEStage(config)
        towers = [tower for tower in (config.text, config.second_text) if tower.model != "none"]
        text = combine_encoders([TextEncoder.random(tower, architecture) for tower in towers])
        tower = ImageTower(aligned_to, {}) if aligned_to else None
        return DiffusionStage(config, VAE(vae).requires_grad_(False).eval(), text, device, tower)

    return [
        StagePlan(folder / f"{name}.yaml", config, partial(build, name), machine, latent_bytes if name == "ldm" else 0)
        for name, config in configs.items()
    ]


def num_features(architecture: dict[str, Any]) -> int:
    """Numbers of the features of one image in the last block of an image tower, which is built without memory."""
    with torch.device("meta"):
        tower = ImageTower(architecture, {})
        return tower(torch.zeros(1, 3, *tower.size))[-1].numel()


# Plans.


def fit_to_memory(plan: StagePlan) -> StagePlan:
    """The largest micro-batch that fits, with gradient checkpointing, then FSDP, if needed; ValueError: none does."""
    machine, own = plan.machine, max(1, round(plan.config.batch_size / plan.machine.ranks))
    unsplittable = plan.file.stem == "clip"  # its loss compares a whole batch, so the batch gets smaller
    divisors = [images for images in range(own, 0, -1) if own % images == 0]
    savers = [(plan.config.gradient_checkpointing, False)]
    if not unsplittable:
        savers += [(True, False), (True, True)] if machine.ranks > 1 else [(True, False)]
    for gradient_checkpointing, fsdp in savers:
        saver = plan.update(gradient_checkpointing=gradient_checkpointing, fsdp=fsdp)
        if unsplittable:
            plans = [saver.update(batch_size=images * machine.ranks) for images in divisors]
        else:
            batch_size = own * machine.ranks
            plans = [saver.update(batch_size=batch_size, grad_accum_steps=own // images) for images in divisors]
        if plans[-1].memory <= machine.usable_bytes:
            return next(plan for plan in plans if plan.memory <= machine.usable_bytes)
    needed, usable = format_bytes(plans[-1].memory), format_bytes(machine.usable_bytes)
    raise ValueError(f"{plan.file}: one image needs {needed}, {usable} are usable")


def choose_recipe(found: dict[str, Recipe], hours: float) -> Recipe:
    """The largest recipe, by its FLOP, that fits in the hours, else the smallest; ValueError: see `fit_to_memory`."""
    smallest, *larger = sorted(found.values(), key=recipe_flop)
    flop, best = recipe_flop(smallest), [fit_to_memory(plan) for plan in smallest]
    for recipe in larger:
        if recipe_hours(best) * recipe_flop(recipe) / flop > SKIP_FACTOR * hours:
            break
        try:
            fitted = [fit_to_memory(plan) for plan in recipe]
        except ValueError:
            break
        if recipe_hours(fitted) > hours:
            break
        flop, best = recipe_flop(recipe), fitted
    return best
