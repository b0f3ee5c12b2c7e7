"""A training step of each stage, of a network with random weights on random images: what a plan measures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ldm.pipeline.pipeline import to_conditioning
from ldm.planning.cost import Loss
from ldm.text import TextConfig, TextEncoder, combine_encoders
from ldm.text.clip import CLIP, CLIPConfig, clip_loss
from ldm.text.tower import TextTower
from ldm.unet import UNet, UNetConfig
from ldm.unet.model import NUM_SIZE_CONDS
from ldm.vae import VAE, VAEConfig
from ldm.vae.losses import VAELossConfig, ssim, vae_loss

Shape = tuple[int, int, int]  # of an image: channels, height, width
Step = tuple[Callable[[bool], nn.Module], Loss]  # makes a network, with gradient checkpointing or without; its loss


def clip_step(clip: CLIPConfig, shape: Shape) -> Step:
    """Both towers, under the contrastive loss. ValueError for a size that the patches do not divide."""
    architecture, criterion = clip.architecture(shape[-1]), clip_loss(rank=0, world=1)

    def loss(module: nn.Module, images: int, device: torch.device) -> Tensor:
        ids = torch.ones(images, clip.context_length, dtype=torch.long, device=device)
        return criterion(**module(torch.rand(images, *shape, device=device), ids))

    return lambda recompute: CLIP(architecture), loss


def vae_step(vae: VAEConfig, weights: VAELossConfig, shape: Shape) -> Step:
    """Encoder and decoder. ValueError for a size that they do not divide."""
    side = vae.latent_size(shape[-1])
    ssim(*torch.zeros(2, 1, *shape))  # it keeps its window, which must not be one of a dry run

    def loss(module: nn.Module, images: int, device: torch.device) -> Tensor:
        pixels = torch.rand(images, *shape, device=device)
        output, posterior = module(pixels, torch.randn(images, vae.latent_channels, side, side, device=device))
        return vae_loss(pixels, output, posterior, weights)["loss"]

    return lambda recompute: VAE(vae, gradient_checkpointing=recompute), loss


def unet_step(
    unet: UNetConfig, vae: VAEConfig, towers: Sequence[tuple[TextConfig, Any]], shape: Shape, *, encoded: bool
) -> Step:
    """The U-Net, behind the frozen text towers, of which open_clip's `model_cfg` is given, and the frozen VAE.

    With latents that are `encoded` before, that one does nothing. ValueError for a size that they do not divide.
    """
    side = vae.latent_size(shape[-1])
    if side % unet.factor:
        raise ValueError(f"image size {shape[-1]} is not a multiple of {vae.factor * unet.factor}")
    masked = towers[0][0].pad_token_id is None

    def loss(module: Any, images: int, device: torch.device) -> Tensor:
        z = torch.randn(images, unet.in_channels, side, side, device=device)
        if not encoded:
            with torch.no_grad():
                z = module.vae.encode(torch.rand(images, *shape, device=device)).mean
        ids = torch.ones(images, module.text.encoders[0].tower.length, dtype=torch.long, device=device)
        context, _, vector = to_conditioning(module.text, module.text.id_states(ids))
        mask = torch.ones_like(ids, dtype=torch.bool) if masked else None
        sizes = torch.ones(images, NUM_SIZE_CONDS, device=device) if unet.size_embed_dim else None
        answer = module.unet(z, torch.rand(images, device=device), context, mask, vector, sizes)
        return (answer.float() - z).square().mean()

    def build(recompute: bool) -> nn.Module:
        text = combine_encoders([random_text_encoder(config, cfg) for config, cfg in towers])
        assert text is not None
        module = nn.ModuleDict({"vae": VAE(vae), "text": text}).requires_grad_(False)
        module["unet"] = UNet(unet, gradient_checkpointing=recompute)
        return module

    return build, loss


def random_text_encoder(config: TextConfig, cfg: Any = None) -> TextEncoder:
    """A text tower with random weights, whose prompts are all as long as can be: no length depends on a number."""
    tower = TextTower(cfg or open_clip.get_model_config(config.model))
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.02)
    padded = config.model_copy(update={"pad_token_id": config.pad_token_id or 0})
    return TextEncoder(tower, None, padded, model_id="random", weights=Path())
