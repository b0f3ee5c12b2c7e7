"""What the VAE is trained on: absolute error, structure, and a small KL term."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ldm.config import Config
from ldm.vae.model import Posterior


class VAELossConfig(Config):
    """Weights of the terms."""

    ssim_weight: float = Field(0.1, ge=0)
    """weight of 1 - SSIM beside the mean absolute error"""
    kl_weight: float = Field(1e-6, ge=0)
    """weight of the KL divergence summed over an image, beside errors summed over its pixels"""


def vae_loss(images: Tensor, output: Tensor, posterior: Posterior, config: VAELossConfig) -> dict[str, Tensor]:
    """Scalar terms by name; "loss" is the one to minimize. All are a mean over pixels, so sizes compare.

    With sums over pixels this is the objective of Rombach et al. 2022 (appendix G) with SSIM in the place of LPIPS,
    whose weights would have to be downloaded.
    """
    error = F.l1_loss(output, images)
    kl = posterior.kl().mean() / images[0].numel()
    terms = {"l1": error, "kl": kl}
    loss = error + config.kl_weight * kl
    if config.ssim_weight:
        terms["structure"] = 1 - ssim(output, images).mean()
        loss = loss + config.ssim_weight * terms["structure"]
    return {"loss": loss, **terms}


def ssim(x: Tensor, y: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Structural similarity for each image, (b,), with an 11 x 11 Gaussian window of deviation 1.5.

    Source: Wang et al. 2004, equation 13. Windows that reach over the border are left out. Sides below 11 raise
    ValueError.
    """
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 pixels a side, not {tuple(x.shape[-2:])}")
    x, y = x.float(), y.float()
    moments = _blur(torch.cat([x, y, x * x, y * y, x * y], 1))
    mean_x, mean_y, xx, yy, xy = moments.chunk(5, 1)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    spread = xx - mean_x**2 + yy - mean_y**2
    structure = (2 * (xy - mean_x * mean_y) + c2) / (spread + c2)
    return (luminance * structure).flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio for each image, (b,), in dB."""
    error = (x.float() - y.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error.clamp_min(1e-12))


def _blur(x: Tensor) -> Tensor:
    """Gaussian window of SSIM: (b, c, h, w) -> (b, c, h - 10, w - 10).

    Written as products with two band matrices, which are far faster than convolutions of single planes.
    """
    rows, columns = (_window_matrix(side, x.device) for side in x.shape[-2:])
    return rows @ x @ columns.mT


@lru_cache(maxsize=8)
def _window_matrix(side: int, device: torch.device) -> Tensor:
    """(side - 10, side): row i weighs the 11 places from i on."""
    window = torch.softmax(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2), 0)
    return torch.stack([F.pad(window, (i, side - 11 - i)) for i in range(side - 10)]).to(device)
