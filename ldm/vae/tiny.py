"""A tiny decoder that imitates a VAE's own, for previews while sampling."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.vae.model import VAEConfig

WIDTH, NUM_LAYERS = 64, 3


class TinyDecoder(nn.Module):
    """Standardized latents (b, c, h, w) -> pixels (b, c, h * factor, w * factor): all its layers are at h x w."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.factor = config.factor
        widths = [config.latent_channels, *[WIDTH] * NUM_LAYERS]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.conv_out = nn.Conv2d(WIDTH, config.image_channels * config.factor**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = 3 * (latents / 3).tanh()  # as latents far outside of the training images' say nothing
        for layer in self.layers:
            h = F.relu(layer(h))
        return F.pixel_shuffle(self.conv_out(h), self.factor)
