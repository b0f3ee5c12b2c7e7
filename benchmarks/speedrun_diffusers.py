"""Train the VAE and U-Net of diffusers for as many seconds as a recipe takes: a row of docs/records.md.

    python benchmarks/speedrun_diffusers.py --vae-seconds 140 --unet-seconds 520

Data, text tower, held-out captions and classifier are those of the speedrun. How it trains is as in the training
scripts of diffusers: AdamW with weight decay 0.01, a constant learning rate after 500 steps, batches of 16, gradients
clipped to 1, averaged weights. AutoencoderKL has factor 8 and 4 channels, a squared error and a KL weight of 1e-6; no
LPIPS, whose weights are not at hand, and no discriminator, which starts after 50,000 steps there. UNet2DConditionModel
predicts the noise on the schedule of Stable Diffusion. Both start from nothing, so the learning rate is 1e-4, that of
the script which does so too (train_unconditional.py). With ACCELERATE_MIXED_PRECISION=bf16 it trains in bf16, as the
speedrun does.

--peer-learning-rate and --peer-warmup-steps change what is too slow for so few steps. Of the recipe's own settings
those of the text tower and of the data count.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from pydantic import Field
from speedrun import PRECISION, SAMPLING_STEPS, TARGETS, HeldOutCaptions, SpeedrunConfig, measure, train_once
from torch import Tensor, nn

from ldm.cli import command
from ldm.data import Batch, DataConfig, open_splits
from ldm.data.loader import load_batches
from ldm.rng import generator
from ldm.stages.clip import CLIPStage
from ldm.text import TextConditioner, load_text_encoder

BATCH, TRAIN_STEPS = 16, 1000
VAE_WIDTHS, UNET_WIDTHS = (32, 64, 128, 128), (128, 256, 256)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class DiffusersConfig(SpeedrunConfig):
    """Settings of the peer: its seconds, its learning rate and the warm-up of that."""

    name: str = "diffusers"
    vae_seconds: float = Field(140, gt=0)
    """in which the VAE is trained"""
    unet_seconds: float = Field(520, gt=0)
    """in which the U-Net is trained"""
    peer_learning_rate: float = Field(1e-4, gt=0)
    """of both"""
    peer_warmup_steps: int = Field(500, ge=0)
    """of both"""
    guidance_scale: float = 7.5
    """with which images are generated"""


def train_for(
    seconds: float,
    network: nn.Module,
    loss: Callable[[Batch], Tensor],
    batches: Iterator[Batch],
    config: DiffusersConfig,
) -> int:
    """Train for so many seconds, and leave the averaged weights in the network; returns the steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.peer_learning_rate, weight_decay=1e-2)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=config.peer_warmup_steps)
    ema, steps, end = EMAModel(network.parameters()), 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        with torch.autocast("cpu", torch.bfloat16, enabled=os.environ.get(PRECISION) == "bf16"):
            value = loss(next(batches))
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        steps += 1
    ema.copy_to(network.parameters())
    network.eval().requires_grad_(False)
    return steps


def batches(data: DataConfig, seed: int) -> Iterator[Batch]:
    """Training images with a caption each, without end."""
    training, _ = open_splits(data, seed=seed)
    sampler = training.make_batch_sampler(
        seed=seed, batch_size=BATCH, start=0, grad_accum_steps=1, rank=0, world=1
    )  # fmt: skip
    for _, batch in load_batches(training, sampler, num_workers=0, timeout=1800, pin_memory=False):
        yield batch


def vae_loss(vae: AutoencoderKL, batch: Batch) -> Tensor:
    """Of a reconstruction through a sampled latent."""
    posterior = vae.encode(batch["image"]).latent_dist
    reconstruction = vae.decode(posterior.sample()).sample
    return F.mse_loss(reconstruction, batch["image"]) + 1e-6 * posterior.kl().mean()


def unet_loss(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text: TextConditioner, scheduler: DDPMScheduler, batch: Batch
) -> Tensor:
    """Of the noise that is predicted; a tenth of the captions is dropped."""
    with torch.no_grad():
        z = vae.encode(batch["image"]).latent_dist.sample() * vae.config.scaling_factor
    noise = torch.randn_like(z)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(z),))
    dropped = torch.rand(len(z)) < 0.1
    captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), batch["caption"], strict=True)]
    return F.mse_loss(unet(scheduler.add_noise(z, noise, t), t, **states(text, captions)).sample, noise)


def states(text: TextConditioner, captions: list[str]) -> dict[str, Tensor | None]:
    """What diffusers' U-Net takes of the captions."""
    embeddings = text.encode_ids(text.tokenizer(captions))
    return {"encoder_hidden_states": embeddings.hidden_states, "encoder_attention_mask": embeddings.mask}


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text: TextConditioner,
    scale: float,
    captions: list[str],
    seeds: range,
) -> Tensor:
    """Images (b, 3, h, w) in [-1, 1], by DPM++ 2M with classifier-free guidance."""
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, num_train_timesteps=TRAIN_STEPS)
    scheduler.set_timesteps(SAMPLING_STEPS)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    z = torch.stack([torch.randn(shape, generator=generator(seed, "noise")) for seed in seeds])
    conditions = states(text, captions + [""] * len(captions))
    for t in scheduler.timesteps:
        cond, uncond = unet(torch.cat([z, z]), t, **conditions).sample.chunk(2)
        z = scheduler.step(uncond + scale * (cond - uncond), t, z).prev_sample
    return vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1)


def run_seed(config: DiffusersConfig, seed: int, captions: HeldOutCaptions) -> dict[str, Any]:
    """Train with one seed; the seconds, and the share of the captions that are right at the end."""
    if config.candidate:
        raise ValueError("candidate: there is none for diffusers; leave it out")
    clip, clip_seconds = train_once(CLIPStage, config.clip, config.run, seed)
    tower = config.ldm.text.model_copy(update={"model": f"local-dir:{clip}", "use_pooled": False})
    text = load_text_encoder([tower], config.run, "")
    assert text is not None
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=VAE_WIDTHS, layers_per_block=2, norm_num_groups=32)
    loss = partial(vae_loss, vae)
    vae_steps = train_for(config.vae_seconds, vae, loss, batches(config.vae.data, seed), config)
    with torch.no_grad():  # diffusers leaves this number to the user: the latents get a deviation of 1
        some = torch.cat([batch["image"] for batch in islice(batches(config.vae.data, seed), 16)])
        vae.register_to_config(scaling_factor=1 / vae.encode(some).latent_dist.sample().std().item())
    unet = UNet2DConditionModel(
        sample_size=config.ldm.data.resolution // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=UNET_WIDTHS,
        cross_attention_dim=text.width,
    )
    scheduler = DDPMScheduler(**SCHEDULE, num_train_timesteps=TRAIN_STEPS)
    loss = partial(unet_loss, unet, vae, text, scheduler)
    unet_steps = train_for(config.unet_seconds, unet, loss, batches(config.ldm.data, seed), config)
    share = captions.share_right(partial(sample, unet, vae, text, config.guidance_scale))
    total = clip_seconds + config.vae_seconds + config.unet_seconds
    return {
        "seconds": {"clip": round(clip_seconds, 1), "vae": config.vae_seconds},
        "steps": {"vae": vae_steps, "unet": unet_steps},
        "curve": {unet_steps: [round(total, 1), round(share, 4)]},
        "until": {f"{target:.0%}": round(total, 1) if share >= target else None for target in TARGETS},
    }


main = command(DiffusersConfig, lambda config: measure(config, run_seed), __doc__)

if __name__ == "__main__":
    main()
