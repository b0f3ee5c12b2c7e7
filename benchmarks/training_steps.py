"""Training steps that benchmarks/run.py compares: our loop, the bare network, and the script of diffusers.

All train the same U-Net, from the same weights, on the same images and captions.
"""

import copy
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from comparisons import Action, Comparison, Pair
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.data.latents import InMemoryLatents
from ldm.data.loader import sample_batches
from ldm.planning.device import total_memory
from ldm.planning.planner import MachineSpec, read_recipe, recipe_stages
from ldm.stages.diffusion import DiffusionStage, TrainLDMConfig
from ldm.training.distributed import make_accelerator
from ldm.training.trainer import Trainer

NUM_BATCHES = 8  # that the script takes in turns
NUM_STEPS, NUM_IMAGES = 10**6, 10**4
GRADIENT_TOLERANCE = 1e-3


@contextmanager
def training_steps(pair: Pair, folder: Path) -> Iterator[Comparison]:
    """A step of our loop, with all that it does, against the bare network and the script of diffusers."""
    config = read_recipe(folder / "ldm.yaml")
    plain = config.diffusion.model_copy(update={"loss_weighting": "uniform", "gamma": None})
    stage = DiffusionStage(config.model_copy(update={"diffusion": plain}), pair.ours.vae, pair.ours.text, pair.device)
    stage.unet.load_state_dict(pair.ours.unet.state_dict())
    check_gradients(stage.unet, pair)
    with open_trainer(stage) as trainer:
        others = {
            "bare network": bare_step(trainer),
            "diffusers' script": script_step(trainer, pair, cached=False),
            "diffusers' script, latents cached": script_step(trainer, pair, cached=True),
        }
        yield Comparison(step_name(config), loop_step(trainer), others, None)


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
        module.to(device)
    with open_trainer(stage) as trainer:
        yield Comparison(step_name(config), loop_step(trainer), {"bare network": bare_step(trainer)}, None)


def step_name(config: TrainLDMConfig) -> str:
    """With what decides its time."""
    side, cached = config.data.resolution, ", latents cached" * (config.cache_latents or bool(config.cached_latents))
    return f"Training step, {side} x {side}, batch {config.batch_size}{cached}"


@contextmanager
def open_trainer(stage: DiffusionStage) -> Iterator[Trainer]:
    """The loop around a stage, which neither validates nor saves."""
    with tempfile.TemporaryDirectory() as folder:
        config = stage.config.model_copy(update={"run": Path(folder) / "run", "trackers": (), "steps": NUM_STEPS})
        accelerator, stage.config = make_accelerator(config), config
        stage.vae_sha256 = None
        stage.fingerprint = dict  # type: ignore[method-assign]  # random towers have no file
        stage.open_data(accelerator)
        trainer = Trainer(config, accelerator, stage)
        with trainer.open_logs(config.steps):
            yield trainer


def check_gradients(unet: nn.Module, pair: Pair) -> None:
    """ValueError unless both networks have the same gradients under the same loss."""
    side = pair.ours.resolution // pair.ours.vae_factor
    config = pair.ours.unet.config
    z, target = pair.randn(2, config.in_channels, side, side), pair.randn(2, config.in_channels, side, side)
    context, t = pair.randn(2, 77, config.context_dim), torch.tensor([10.0, 900.0], device=pair.device)
    norms = []
    for network, prediction in (
        (unet, lambda: unet(z, t, Conditioning(context))),
        (pair.theirs.unet, lambda: pair.theirs.unet(z, t, context).sample),
    ):
        network.requires_grad_(True)
        F.mse_loss(prediction(), target).backward()
        norms.append(torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm().item())
        network.zero_grad(set_to_none=True)
    if abs(norms[0] - norms[1]) > GRADIENT_TOLERANCE * norms[1]:
        raise ValueError(f"training step: the gradients differ: {norms[0]:.6g} and {norms[1]:.6g}")


def loop_step(trainer: Trainer) -> Action:
    """Of our loop, from the next batch on."""
    batches = trainer.batches(start=0)

    def step() -> Tensor:
        trainer.train_step(batches)
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


def script_step(trainer: Trainer, pair: Pair, *, cached: bool) -> Action:
    """As train_text_to_image.py of diffusers has it, with averaged weights; its pixels and token ids are at hand.

    `cached`: the latents are at hand, too, which it cannot do.
    """
    theirs, device = pair.theirs, pair.device
    unet = copy.deepcopy(theirs.unet).train().requires_grad_(True)
    noise_scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    lr_scheduler = get_scheduler("constant", optimizer)
    ema, accelerator = EMAModel(unet.parameters()), trainer.accelerator
    batch_size = trainer.config.batch_size
    batches = itertools.cycle(prepared_batches(trainer, pair, batch_size))

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return theirs.vae.encode(pixels).latent_dist.sample() * theirs.vae.config.scaling_factor

    latents_at_hand = {id(pixels): encode(pixels) for pixels, _ in itertools.islice(batches, NUM_BATCHES)}

    def step() -> Tensor:
        pixels, ids = next(batches)
        with torch.no_grad():
            latents = latents_at_hand[id(pixels)] if cached else encode(pixels)
            hidden_states = theirs.text_encoder(ids)[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),), device=device).long()
        with accelerator.autocast():
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy, timesteps, hidden_states, return_dict=False)[0]
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


def prepared_batches(trainer: Trainer, pair: Pair, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Pixels and token ids of training images."""
    data: Any = trainer.stage.data
    data = data.data if isinstance(data, InMemoryLatents) else data
    prepared = []
    for batch in sample_batches(data, range(NUM_BATCHES * batch_size), batch_size=batch_size):
        ids = pair.theirs.tokenizer(
            batch["caption"], max_length=77, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        prepared.append((batch["image"].to(pair.device), ids.to(pair.device)))
    return prepared
