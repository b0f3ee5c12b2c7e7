"""Training steps that benchmarks/run.py compares: our loop, the bare network, and the script of diffusers.

All train the same U-Net, from the same weights, on the same images and captions, without gradient checkpointing.
"""

import copy
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from comparisons import COMPILED, OURS, THEIRS, Action, Comparison, write_weights
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.data import DataConfig
from ldm.data.latents import InMemoryLatents
from ldm.data.loader import sample_batches
from ldm.data.sources import shapes
from ldm.pipeline.load import load_components
from ldm.planning.device import total_memory
from ldm.planning.planner import MachineSpec, read_recipe, recipe_stages
from ldm.precision import compile_network, place
from ldm.rng import generator
from ldm.stages.diffusion import DiffusionStage, TrainLDMConfig
from ldm.training.distributed import make_accelerator
from ldm.training.trainer import Trainer

BARE, SCRIPT, CACHED = "bare network", f"{THEIRS}' script", ", latents cached"
NUM_BATCHES = 8  # that the script takes in turns
NUM_STEPS, NUM_IMAGES = 10**6, 10**4
GRADIENT_TOLERANCE = 1e-3


def step_config(folder: Path, **values: Any) -> TrainLDMConfig:
    """That of a recipe, with other values of what decides the time of a step, and a loss that the script has."""
    config = cast(TrainLDMConfig, read_recipe(folder / "ldm.yaml"))
    plain = config.diffusion.model_copy(update={"loss_weighting": "uniform", "gamma": None})
    data = config.data.model_copy(update={"resolution": values.pop("resolution", config.data.resolution)})
    width = values.pop("model_channels", config.unet.model_channels)
    values["unet"] = config.unet.model_copy(update={"model_channels": width})
    return config.model_copy(update={"diffusion": plain, "data": data, "gradient_checkpointing": False, **values})


def step_name(config: TrainLDMConfig) -> str:
    """With what decides its time."""
    side, cached = config.data.resolution, CACHED * (config.cache_latents or bool(config.cached_latents))
    return f"Training step, {side} x {side}, batch {config.batch_size}{cached}"


@contextmanager
def training_steps(
    weights: Path, config: TrainLDMConfig, device: torch.device, *, compiled: bool = False
) -> Iterator[Comparison]:
    """A step of our loop, with all that it does, against the bare network and the script of diffusers.

    `weights` is a folder of diffusers. All compute in what accelerate's environment says. The script neither caches
    latents nor compiles; what it would take if it did is measured, too.
    """
    check_gradients(load_components(weights).unet, StableDiffusionPipeline.from_pretrained(weights).unet, device)
    with ExitStack() as stack:
        trainer = stack.enter_context(open_trainer(make_stage(weights, config, device)))
        ways: dict[str, Action] = {}
        if compiled:
            stage = make_stage(weights, config.model_copy(update={"compile": True}), device)
            ways[OURS + COMPILED] = loop_step(stack.enter_context(open_trainer(stage)))
        ways |= {OURS: loop_step(trainer), BARE: bare_step(trainer), SCRIPT: script_step(trainer, weights)}
        if config.cache_latents:
            ways[SCRIPT + CACHED] = script_step(trainer, weights, cached=True)
            if compiled:
                ways[SCRIPT + CACHED + COMPILED] = script_step(trainer, weights, cached=True, compiled=True)
        yield Comparison(ways, None)


@contextmanager
def narrow_training_steps(recipe: Path, config: TrainLDMConfig, device: torch.device) -> Iterator[Comparison]:
    """`training_steps` of a U-Net that is not as wide as the recipe's, under its whole VAE and text tower."""
    with tempfile.TemporaryDirectory() as name:
        write_weights(recipe, config, Path(name))
        with training_steps(Path(name), config, device) as comparison:
            yield comparison


@contextmanager
def bare_training_step(folder: Path, device: torch.device) -> Iterator[Comparison]:
    """A step of our loop against the bare network, of a recipe that diffusers has no networks for."""
    config = read_recipe(folder / "ldm.yaml")
    machine = MachineSpec(gpus=0, usable_bytes=total_memory(device), device=None, tflops=None)
    *_, plan = recipe_stages(folder, config.data.resolution, machine, NUM_IMAGES)
    stage = cast(DiffusionStage, plan.build(False, device))
    for encoder in stage.text.encoders if stage.text else ():
        encoder.trim = True
    for module in stage.frozen.values():
        place(module, device)
    with open_trainer(stage) as trainer:
        yield Comparison({OURS: loop_step(trainer), BARE: bare_step(trainer)}, None)


def make_stage(weights: Path, config: TrainLDMConfig, device: torch.device) -> DiffusionStage:
    """The networks of a folder of diffusers, in training."""
    unet, _, vae, text, *_ = load_components(weights)
    stage = DiffusionStage(config, vae, text, device)
    stage.unet.load_state_dict(unet.state_dict())
    for module in stage.frozen.values():
        place(module, device)
    if config.compile:
        compile_network(stage.unet)
    return stage


@contextmanager
def open_trainer(stage: DiffusionStage) -> Iterator[Trainer]:
    """The loop around a stage, which neither validates nor saves."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values: dict[str, Any] = {"run": folder / "run", "trackers": (), "steps": NUM_STEPS}
        if stage.config.data.drawn is None:
            count = NUM_BATCHES * stage.config.batch_size
            values["data"] = draw_photographs(stage.config.data, folder / "photographs", count)
        config = stage.config.model_copy(update=values)
        accelerator, stage.config = make_accelerator(config), config
        stage.vae_sha256 = None
        stage.fingerprint = dict  # type: ignore[method-assign]  # random towers have no file
        stage.open_data(accelerator)
        trainer = Trainer(config, accelerator, stage)
        with trainer.open_logs(config.steps):
            yield trainer


def draw_photographs(config: DataConfig, folder: Path, count: int) -> DataConfig:
    """Files to read in the place of photographs, with captions."""
    folder.mkdir()
    scenes = shapes.scenes("train")
    for index in range(count):
        scene = scenes[index * len(scenes) // count]
        shapes.render(scene, config.resolution, seed=index).save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(shapes.captions(scene)[0])
    return config.model_copy(update={"source": str(folder)})


def check_gradients(ours: nn.Module, theirs: Any, device: torch.device) -> None:
    """ValueError unless the gradient of each parameter has the same norm in both networks, under the same loss."""
    ours.to(device), theirs.to(device)
    draws = generator(0, "gradients")
    side, channels = theirs.config.sample_size, theirs.config.in_channels
    z, target = (torch.randn(2, channels, side, side, generator=draws).to(device) for _ in range(2))
    context = torch.randn(2, 77, theirs.config.cross_attention_dim, generator=draws).to(device)
    t = torch.tensor([10.0, 900.0], device=device)
    predictions: list[tuple[nn.Module, Action]] = [
        (ours, lambda: ours(z, t, Conditioning(context))),
        (theirs, lambda: theirs(z, t, context, return_dict=False)[0]),
    ]
    norms = []
    for network, predict in predictions:
        network.requires_grad_(True)
        F.mse_loss(predict(), target).backward()
        gradients = [p.grad.norm() for p in network.parameters() if p.grad is not None]
        norms.append(torch.stack(gradients).sort().values)
    if norms[0].shape != norms[1].shape or (norms[0] - norms[1]).norm() > GRADIENT_TOLERANCE * norms[1].norm():
        raise ValueError("training step: the gradients differ")


def loop_step(trainer: Trainer) -> Action:
    """Of our loop, from the next batch on."""
    batches = trainer.batches(start=0)

    def step() -> Tensor:
        trainer.train_step(batches)
        trainer.state.optimizers["unet"].zero_grad(set_to_none=True)  # as the others, whose memory is compared
        return trainer.losses["loss"]

    return step


def bare_step(trainer: Trainer) -> Action:
    """Forward, backward and Adam of the same network, on what the loop gave it last."""
    network = trainer.networks["unet"]
    trained, inputs = copy.deepcopy(network), list[Any]()
    network.register_forward_pre_hook(lambda module, given: inputs.__setitem__(slice(None), given))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with trainer.accelerator.autocast():
            answer = trained(*inputs)
            outputs = answer if isinstance(answer, tuple) else (answer,)
            loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def script_step(trainer: Trainer, weights: Path, *, cached: bool = False, compiled: bool = False) -> Action:
    """As train_text_to_image.py of diffusers has it, with averaged weights; its pixels and token ids are at hand.

    `cached`: the latents are at hand, too.
    """
    accelerator, device = trainer.accelerator, trainer.accelerator.device
    theirs = StableDiffusionPipeline.from_pretrained(weights)
    frozen_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    vae, text_encoder = (part.to(device, frozen_dtype) for part in (theirs.vae, theirs.text_encoder))
    unet = theirs.unet.to(device).train().requires_grad_(True)
    noise_scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    lr_scheduler, ema = get_scheduler("constant", optimizer), EMAModel(unet.parameters())
    called = torch.compile(unet, fullgraph=True) if compiled else unet
    batch_size = trainer.config.batch_size
    prepared = prepared_batches(trainer, theirs.tokenizer, batch_size)
    batches = itertools.cycle(prepared)

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return vae.encode(pixels.to(frozen_dtype)).latent_dist.sample() * vae.config.scaling_factor

    latents_at_hand = {id(pixels): encode(pixels) for pixels, _ in prepared} if cached else {}

    def step() -> Tensor:
        pixels, ids = next(batches)
        with torch.no_grad():
            latents = latents_at_hand[id(pixels)] if cached else encode(pixels)
            hidden_states = text_encoder(ids)[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),), device=device).long()
        with accelerator.autocast():
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            prediction = called(noisy, timesteps, hidden_states, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
        accelerator.gather(loss.repeat(batch_size)).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        return loss.detach()

    return step


def prepared_batches(trainer: Trainer, tokenizer: Any, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Pixels and token ids of training images."""
    data, device = cast(Any, trainer.stage.data), trainer.accelerator.device
    data = data.data if isinstance(data, InMemoryLatents) else data
    prepared, count = [], NUM_BATCHES * batch_size
    for batch in sample_batches(data, [index % len(data) for index in range(count)], batch_size=batch_size):
        ids = tokenizer(batch["caption"], max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        prepared.append((batch["image"].to(device), ids.input_ids.to(device)))
    return prepared
