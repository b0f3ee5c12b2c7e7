"""What benchmarks/run.py compares: actions of ours, and the same of diffusers on the same weights and inputs."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.process import Diffusion
from ldm.interop.components import ModelComponents
from ldm.interop.diffusers import write
from ldm.pipeline import Pipeline
from ldm.pipeline.inputs import initial_noise
from ldm.planning.planner import read_recipe
from ldm.rng import generator
from ldm.text import TextEncoder, combine_encoders
from ldm.unet import UNet
from ldm.vae import VAE

PROMPT = "a photograph of an astronaut riding a horse"
SAMPLING_STEPS = 50
GUIDANCE_SCALE = 7.5

Action = Callable[[], Tensor]
Network = TypeVar("Network", bound=nn.Module)


class Comparison(NamedTuple):
    """One action of ours and the same of others: what they return must be equal, up to `tolerance`."""

    name: str
    ours: Action
    theirs: dict[str, Action]  # by whose it is
    tolerance: float | None  # of the root mean square of the difference, over that of theirs; None: cannot be equal


class Pair(NamedTuple):
    """Two pipelines of the same weights."""

    ours: Pipeline
    theirs: StableDiffusionPipeline
    device: torch.device

    def randn(self, *shape: int) -> Tensor:
        """The same numbers on every device."""
        return torch.randn(*shape, generator=generator(0, "benchmark", *shape)).to(self.device)


@contextmanager
def make_pair(recipe: Path, device: torch.device) -> Iterator[Pair]:
    """Networks of a recipe with random weights, as ours and as those of diffusers."""
    ldm, vae = read_recipe(recipe / "ldm.yaml"), read_recipe(recipe / "vae.yaml").vae
    clip = recipe / "clip.yaml"
    architecture = read_recipe(clip).clip.architecture(ldm.data.resolution) if clip.is_file() else None
    text = combine_encoders([TextEncoder.random(ldm.text, architecture)])
    unet, diffusion = randomized(UNet(ldm.unet)), Diffusion(ldm.diffusion)
    components = ModelComponents(unet, diffusion, randomized(VAE(vae)), text, ldm.data.resolution)
    with tempfile.TemporaryDirectory() as folder:
        write(components, Path(folder))
        del components, unet, text  # of which there are two copies now
        theirs = StableDiffusionPipeline.from_pretrained(folder).to(device)
        theirs.set_progress_bar_config(disable=True)
        yield Pair(Pipeline.load(folder, device=device, precision="float32"), theirs, device)


def randomized(network: Network) -> Network:
    """Without layers of zeros, behind which all networks are equal."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return network


def forward(name: str, ours: Action, theirs: Action, tolerance: float = 1e-3) -> Comparison:
    """Of what has no gradients."""
    return Comparison(name, torch.no_grad()(ours), {"diffusers": torch.no_grad()(theirs)}, tolerance)


# Networks.


def unet_forward(pair: Pair, batch: int) -> Comparison:
    """A forward pass, with a context of 77 tokens."""
    network, side = pair.ours.unet, pair.ours.resolution // pair.ours.vae_factor
    z = pair.randn(batch, network.config.in_channels, side, side)
    context = pair.randn(batch, 77, network.config.context_dim)
    t = torch.full((batch,), 500.0, device=pair.device)
    return forward(
        f"U-Net, {side} x {side}, batch {batch}",
        lambda: network(z, t, Conditioning(context)),
        lambda: pair.theirs.unet(z, t, context).sample,
    )


def vae_encode(pair: Pair, side: int) -> Comparison:
    """The mean of the posterior of an image."""
    assert pair.ours.vae is not None
    vae, image = pair.ours.vae, pair.randn(1, pair.ours.vae.config.image_channels, side, side).clamp(-1, 1)
    return forward(
        f"VAE, encode {side} x {side}",
        lambda: vae.encode(image).mean,
        lambda: pair.theirs.vae.encode(image).latent_dist.mean,
    )


def vae_decode(pair: Pair, side: int) -> Comparison:
    """An image of a latent."""
    assert pair.ours.vae is not None
    vae, cells = pair.ours.vae, side // pair.ours.vae_factor
    latents = pair.randn(1, vae.config.latent_channels, cells, cells)
    return forward(
        f"VAE, decode {side} x {side}",
        lambda: vae.decode(latents),
        lambda: pair.theirs.vae.decode(latents).sample,
    )


def encode_text(pair: Pair, batch: int) -> Comparison:
    """Hidden states of prompts, with their tokens."""
    assert pair.ours.text is not None
    tower, prompts = pair.ours.text, [f"{PROMPT}, number {i}" for i in range(batch)]

    def theirs() -> Tensor:
        return pair.theirs.encode_prompt(prompts, pair.device, 1, do_classifier_free_guidance=False)[0]

    return forward(
        f"Text tower, batch {batch}",
        lambda: tower.encode_prompts(prompts).hidden_states,
        theirs,
    )


# A prompt to an image.


def prompt_to_image(pair: Pair, steps: int = SAMPLING_STEPS) -> Comparison:
    """DDIM with guidance; from the same noise the image is the same."""
    side = pair.ours.resolution // pair.ours.vae_factor
    noise = initial_noise((pair.ours.unet.config.in_channels, side, side), [0]).to(pair.device)

    def ours() -> Tensor:
        settings: dict[str, Any] = {"sampler": "ddim", "eta": 0.0, "seed": 0}
        [image] = pair.ours(PROMPT, steps=steps, guidance_scale=GUIDANCE_SCALE, **settings)
        return torch.tensor(list(image.tobytes())).float()

    def theirs() -> Tensor:
        [image] = pair.theirs(
            PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, latents=noise, eta=0.0
        ).images
        return torch.tensor(list(image.tobytes())).float()

    return forward(f"Prompt to image, DDIM, {steps} steps, guidance", ours, theirs, tolerance=1e-2)
