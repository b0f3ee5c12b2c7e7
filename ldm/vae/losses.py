"""The VAE's training loss: error of the pixels, structural similarity, features, and a small KL term."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ldm.config import Config
from ldm.vae.model import Posterior

SSIM_WINDOW = 11  # pixels on a side


class VAELossConfig(Config):
    """The terms and their weights, relative to the error of the pixels."""

    pixel_loss: Literal["l1", "l2"] = "l1"
    """mean absolute or mean squared error of the pixels"""
    ssim_weight: float = Field(0.1, ge=0)
    """weight of 1 - SSIM"""
    kl_weight: float = Field(1e-6, ge=0)
    """weight of the KL divergence of an image, relative to errors summed over its pixels"""
    latent_noise: float = Field(0.0, ge=0)
    """largest deviation of the noise that is added to latents before they are decoded, relative to that of each
    channel; it is another for each image. The decoder learns to remove the small errors of generated latents"""
    perceptual_weight: float = Field(0.0, ge=0)
    """weight of the distance between features of images"""
    perceptual: str = "latest"
    """whose features: an OpenCLIP image tower (`local-dir:FOLDER`, an open_clip name, `hf-hub:ORG/NAME`; `latest`: that
    of the newest finished train_clip run near this run), or `lpips`"""
    perceptual_pretrained: str | None = None
    """open_clip's tag of the tower's weights, such as openai"""
    lpips_files: tuple[Path, Path] | None = None
    """torchvision's VGG16 weights (vgg16-397923af.pth) and LPIPS' linear layers (vgg.pth)"""
    adversarial_weight: float = Field(0.0, ge=0)
    """above 0 a discriminator is trained too; 1 lets it move the last layer as much as all other terms do"""
    adversarial_start: int = Field(0, ge=0)
    """steps before the discriminator begins"""
    max_adaptive_weight: float = Field(100.0, gt=0)
    """upper limit of the factor that makes the adversarial loss move the last layer as the other terms do"""
    equivariance_probability: float = Field(0.0, ge=0, le=1)
    """share of steps in which scaled and turned latents must decode to scaled and turned images (EQ-VAE)"""

    @model_validator(mode="after")
    def _check(self) -> "VAELossConfig":
        if self.perceptual_weight and (self.perceptual == "lpips") != (self.lpips_files is not None):
            given = f"perceptual {self.perceptual}, lpips_files {self.lpips_files}"
            raise ValueError(f"{given}: lpips needs both of its files, which are not downloaded, and nothing else does")
        return self


Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images (b, c, h, w) -> their mean distance."""


def vae_loss(
    images: Tensor, output: Tensor, posterior: Posterior, config: VAELossConfig, perceptual: Distance | None = None
) -> dict[str, Tensor]:
    """Scalar terms by name, of images and output (b, c, h, w); "loss" is the one to minimize.

    It is the objective of Rombach et al. 2022 (appendix G) as means over pixels, which compare between sizes, with SSIM
    beside the features. The adversarial loss comes on top, as it needs another network.
    """
    error = (F.l1_loss if config.pixel_loss == "l1" else F.mse_loss)(output, images)
    kl = posterior.kl().mean() / images[0].numel()
    terms = {config.pixel_loss: error, "kl": kl}
    loss = error + config.kl_weight * kl
    if config.ssim_weight:
        terms["structure"] = 1 - ssim(output, images).mean()
        loss = loss + config.ssim_weight * terms["structure"]
    if perceptual is not None:
        terms["perceptual"] = perceptual(output, images)
        loss = loss + config.perceptual_weight * terms["perceptual"]
    return {"loss": loss, **terms}


def ssim(x: Tensor, y: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Structural similarity of images (b, c, h, w): (b,), with an 11 x 11 Gaussian window of standard deviation 1.5.

    Source: Wang et al. 2004, equation 13; windows that cross the border are left out. ValueError: sides below 11.
    """
    if not has_ssim(x):
        raise ValueError(
            f"SSIM needs sides of at least {SSIM_WINDOW} pixels, got {tuple(x.shape[-2:])}: set ssim_weight to 0"
        )
    x, y = x.float(), y.float()
    with torch.autocast(x.device.type, enabled=False):  # variances are small differences of moments, which bf16 loses
        mean_x, mean_y, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y], 1)).chunk(5, 1)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variance = xx - mean_x**2 + yy - mean_y**2
    structure = (2 * (xy - mean_x * mean_y) + c2) / (variance + c2)
    return (luminance * structure).flatten(1).mean(1)


def has_ssim(images: Tensor) -> bool:
    """Whether images (b, c, h, w) are as large as the window of SSIM."""
    return min(images.shape[-2:]) >= SSIM_WINDOW


def psnr(x: Tensor, y: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of images (b, c, h, w): (b,), in dB."""
    error = (x.float() - y.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error.clamp_min(1e-12))


def _blur(x: Tensor) -> Tensor:
    """Gaussian window of SSIM, by fast products with band matrices: (b, c, h, w) -> (b, c, h - 10, w - 10)."""
    rows, columns = (_window_matrix(side, x.device) for side in x.shape[-2:])
    return rows @ x @ columns.mT


def _window_matrix(side: int, device: torch.device) -> Tensor:
    """(side - 10, side): row i weights the 11 pixels from i on."""
    window = torch.softmax(-((torch.arange(11.0, device=device) - 5) ** 2) / (2 * 1.5**2), 0)
    places = torch.arange(side, device=device) - torch.arange(side - 10, device=device)[:, None]
    return torch.where((places >= 0) & (places < 11), window[places.clamp(0, 10)], 0.0)
