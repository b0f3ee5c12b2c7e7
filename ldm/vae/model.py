"""The convolutional KL autoencoder (Rombach et al. 2022, section 3.1), down to the exact Stable Diffusion one."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from ldm.config import Config
from ldm.layers import Upsample, check_group_norm, checkpointed, zero_init_
from ldm.parts import VAE_PIXELS, images_at_once
from ldm.vae.blocks import Downsample, ResidualBlock, group_norm, mid_block

MIN_PCA_SCALE = 1e-6  # of the components' standard deviation: below it is what rounding leaves of no variance


class VAEConfig(Config):
    """The defaults are the Stable Diffusion VAE: factor 8, 4 latent channels, 83,653,863 parameters."""

    image_channels: int = Field(3, ge=1)
    """3 for RGB, 1 for grey"""
    patch_size: int = Field(1, ge=1)
    """side of the pixel blocks that are folded into channels before the first convolution"""
    base_channels: int = Field(128, ge=1)
    """width of the first level"""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """width of each level as a multiple of `base_channels`; each further level halves the resolution"""
    num_res_blocks: int = Field(2, ge=1)
    """residual blocks in a level of the encoder; the decoder has one more"""
    mid_attention: bool = True
    """self-attention at the lowest resolution"""
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    """groups of each GroupNorm"""

    @model_validator(mode="after")
    def _check(self) -> "VAEConfig":
        check_group_norm(dict.fromkeys(self.widths, self.norm_num_groups), widths="base_channels x channel_mult")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base_channels * m for m in self.channel_mult)

    @property
    def factor(self) -> int:
        """Pixels for each latent cell, along one side."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    def latent_size(self, size: int) -> int:
        """Side of the latent of an image whose side is `size`; ValueError when the factor does not divide it."""
        if size % self.factor:
            raise ValueError(f"image size {size} is not a multiple of {self.factor}, the VAE's factor")
        return size // self.factor

    def latent_shape(self, images: Tensor) -> tuple[int, int, int]:
        """(c, h, w) of the latents of images (b, c, h, w)."""
        height, width = (self.latent_size(side) for side in images.shape[-2:])
        return self.latent_channels, height, width


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents (b, c, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + standard deviation x noise (Kingma and Welling 2014, section 2.4), all (b, c, h, w)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence from the standard normal for each image: (b,), in nats."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class Encoder(nn.Module):
    """(b, c, h, w) pixels -> (b, 2 * latent_channels, h / factor, w / factor)."""

    def __init__(self, config: VAEConfig, *, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.patch_size, self.gradient_checkpointing = config.patch_size, gradient_checkpointing
        widths, num_groups = config.widths, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.image_channels * config.patch_size**2, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[max(level - 1, 0)], *[width] * (config.num_res_blocks - 1)]
            blocks = [ResidualBlock(channels, width, num_groups=num_groups) for channels in inputs]
            down = [Downsample(width)] if level < len(widths) - 1 else []
            self.levels.append(nn.Sequential(*blocks, *down))
        self.middle = mid_block(widths[-1], attention=config.mid_attention, num_groups=num_groups)
        self.norm_out = group_norm(num_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(images, self.patch_size))
        for level in self.levels:
            h = checkpointed(level, h, recompute=self.gradient_checkpointing)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """(b, latent_channels, h, w) -> (b, c, h * factor, w * factor) pixels."""

    def __init__(self, config: VAEConfig, *, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.patch_size, self.gradient_checkpointing = config.patch_size, gradient_checkpointing
        widths, num_groups = config.widths[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = mid_block(widths[0], attention=config.mid_attention, num_groups=num_groups)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[max(level - 1, 0)], *[width] * config.num_res_blocks]
            blocks = [ResidualBlock(channels, width, num_groups=num_groups) for channels in inputs]
            up = [Upsample(width)] if level < len(widths) - 1 else []
            self.levels.append(nn.Sequential(*blocks, *up))
        self.norm_out = group_norm(num_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels * config.patch_size**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.middle(self.conv_in(latents))
        for level in self.levels:
            h = checkpointed(level, h, recompute=self.gradient_checkpointing)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch_size)


class PCASkip(nn.Module):
    """Linear compression of patches to latents and back, added to the networks where only patching changes the size.

    The best linear autoencoder is known in closed form, principal components (Baldi and Hornik 1989): training starts
    from there and the networks learn what a linear map cannot do, as in the residual autoencoding of Chen et al. 2024.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        values = config.image_channels * config.patch_size**2
        self.encode = nn.Conv2d(values, config.latent_channels, 1)
        self.decode = nn.Conv2d(config.latent_channels, values, 1)

    def to_latents(self, images: Tensor) -> Tensor:
        """Pixels (b, c, h, w) -> latents (b, latent_channels, h / patch, w / patch), in float32."""
        with torch.autocast(images.device.type, enabled=False):  # what the networks add is small beside it
            return self.encode(F.pixel_unshuffle(images.to(self.encode.weight), self.patch_size))

    def to_images(self, latents: Tensor) -> Tensor:
        """The inverse of `to_latents`, as far as there is one; in float32."""
        with torch.autocast(latents.device.type, enabled=False):
            return F.pixel_shuffle(self.decode(latents.to(self.decode.weight)), self.patch_size)

    @torch.no_grad()
    def init_from_pca(self, images: Tensor) -> None:
        """Set both maps from the principal components of the patches of (b, c, h, w) images.

        ValueError: they have no variance, and so no components.
        """
        patches = rearrange(F.pixel_unshuffle(images, self.patch_size), "b v h w -> (b h w) v").cpu().double()
        mean = patches.mean(0)
        variance, directions = torch.linalg.eigh((patches - mean).mT @ (patches - mean) / len(patches))
        count = self.encode.out_channels
        basis = directions[:, -count:].flip(1)  # (values, latent channels), the largest variance first
        scale = variance[-count:].mean().clamp_min(0).sqrt()
        if not scale > MIN_PCA_SCALE:
            raise ValueError("images: all pixels have one colour, so there are no principal components: check the set")
        self.encode.weight.copy_((basis.mT / scale)[..., None, None])
        self.encode.bias.copy_(-(basis.mT @ mean) / scale)  # type: ignore[union-attr]
        self.decode.weight.copy_((basis * scale)[..., None, None])
        self.decode.bias.copy_(mean)  # type: ignore[union-attr]


class VAE(nn.Module):
    """Encoder and decoder, with the measured statistics of the latents.

    `encode` and `decode` work on raw latents, diffusion on standardized ones: `standardize` and `unstandardize` use the
    mean and standard deviation of each channel that training measured, so no scale is set by hand.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, gradient_checkpointing=gradient_checkpointing)
        self.decoder = Decoder(config, gradient_checkpointing=gradient_checkpointing)
        latents = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)
        patches_only = config.patch_size > 1 and len(config.channel_mult) == 1
        self.linear = self._pca_skip() if patches_only else None
        self.register_buffer("latent_mean", torch.zeros(latents))
        self.register_buffer("latent_std", torch.ones(latents))

    def cast(self, dtype: torch.dtype) -> "VAE":
        """Compute in this precision, but for the statistics and the linear part, which stay in float32."""
        for part in (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv):
            part.to(dtype)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What its convolutions compute in, outside of autocast."""
        return self.quant_conv.weight.dtype

    def encode(self, images: Tensor) -> Posterior:
        """Pixels (b, c, h, w) in [-1, 1] -> the posterior, (b, *latent_shape); ValueError: see `latent_size`.

        Without gradients in parts, see `images_at_once`.
        """
        self.config.latent_shape(images)  # checks the sides
        if torch.is_grad_enabled():
            return self._encode(images)
        parts = [self._encode(part) for part in images.split(images_at_once(images.shape[-2:], VAE_PIXELS))]
        return Posterior(*map(torch.cat, zip(*parts, strict=True)))

    def _encode(self, images: Tensor) -> Posterior:
        h = self.encoder(images.to(self.dtype))
        mean, logvar = self.quant_conv(h).float().chunk(2, dim=1)
        if self.linear is not None:
            mean = mean + self.linear.to_latents(images)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (b, latent_channels, h, w) -> (b, c, h * factor, w * factor) pixels, about in [-1, 1].

        Without gradients in parts, see `images_at_once`.
        """
        if torch.is_grad_enabled():
            return self._decode(latents)
        height, width = (self.config.factor * side for side in latents.shape[-2:])
        return torch.cat([self._decode(part) for part in latents.split(images_at_once((height, width), VAE_PIXELS))])

    def _decode(self, latents: Tensor) -> Tensor:
        images = self.decoder(self.post_quant_conv(latents.to(self.dtype))).float()
        if self.linear is not None:
            images = images + self.linear.to_images(latents)
        return images

    def _pca_skip(self) -> PCASkip:
        """Start as the linear autoencoder alone: the networks' output is 0, the posterior's standard deviation 0.05."""
        zero_init_(self.encoder.conv_out)
        zero_init_(self.decoder.conv_out)
        nn.init.constant_(zero_init_(self.quant_conv).bias[self.config.latent_channels :], -6.0)  # type: ignore[index]
        return PCASkip(self.config)

    def forward(
        self, images: Tensor, noise: Tensor, change: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Posterior]:
        """Images (b, c, h, w) reconstructed through a sampled latent, and its posterior; `noise` has its shape.

        With `change`, what is decoded is what it makes of the latents.
        """
        posterior = self.encode(images)
        latents = posterior.sample(noise)
        return self.decode(change(latents) if change else latents), posterior

    def standardize(self, latents: Tensor) -> Tensor:
        """Raw latents (b, c, h, w) -> zero mean and unit variance in each channel."""
        return (latents - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)

    @torch.no_grad()
    def fit_latent_stats(self, batches: Iterable[Tensor]) -> None:
        """Set `latent_mean` and `latent_std` to those of sampled latents of images (b, c, h, w) on this device."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for images in batches:
            posterior = self.encode(images)
            # On the CPU, as Apple's GPUs have no float64: (c, b h w) each.
            mean, logvar = (x.cpu().double().transpose(0, 1).flatten(1) for x in (posterior.mean, posterior.logvar))
            count += mean.shape[1]
            total = total + mean.sum(1)
            squares = squares + (mean**2 + logvar.exp()).sum(1)  # the means vary, and the samples around them
        average = total / count
        self.latent_mean.copy_(average)
        self.latent_std.copy_((squares / count - average**2).clamp_min(1e-12).sqrt())

    def unstandardize(self, latents: Tensor) -> Tensor:
        """The inverse of `standardize`."""
        return latents * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)
