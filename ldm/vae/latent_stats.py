"""Measure mean and standard deviation of a data set's latents, so that diffusion can standardize them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ldm.vae.model import VAE


@torch.no_grad()
def fit_latent_stats(vae: VAE, batches: Iterable[Tensor]) -> None:
    """Set `latent_mean` and `latent_std` to those of sampled latents of images (b, c, h, w) on the VAE's device."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for images in batches:
        posterior = vae.encode(images)
        mean = posterior.mean.double().transpose(0, 1).flatten(1)  # (c, b h w)
        variance = posterior.logvar.double().exp().transpose(0, 1).flatten(1)
        count += mean.shape[1]
        total = total.to(mean) + mean.sum(1)
        squares = squares.to(mean) + (mean**2 + variance).sum(1)  # the means vary, and the samples around them
    average = total / count
    vae.latent_mean.copy_(average)
    vae.latent_std.copy_((squares / count - average**2).clamp_min(1e-12).sqrt())
