"""The U-Net with cross-attention (Rombach et al. 2022, section 3.3), up to the exact Stable Diffusion ones."""

from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ldm.config import Config
from ldm.layers import Upsample, check_group_norm, checkpointed, zero_init_
from ldm.unet.blocks import Context, Downsample, ResidualBlock, SpatialTransformer, group_norm, timestep_embedding

NUM_SIZE_CONDS = 6  # numbers that tell how a picture was cut


class UNetConfig(Config):
    """The defaults are the Stable Diffusion 1.5 U-Net: 859,520,964 parameters."""

    in_channels: int = Field(4, ge=1)
    """channels of what is denoised"""
    cond_channels: int = Field(0, ge=0)
    """channels that are only looked at; an inpainting network has 5, the mask and the latents around it"""
    patch_size: int = Field(1, ge=1)
    """side of the blocks that are folded into channels before the first convolution"""
    model_channels: int = Field(320, ge=32)
    """width of the first level"""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """width of each level as a multiple of `channels`; each further level halves the resolution"""
    num_res_blocks: int = Field(2, ge=1)
    """residual blocks in a level on the way down; one more on the way up"""
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    """transformer blocks after each residual block of a level; 0 means no attention there"""
    mid_transformer_depth: int = Field(1, ge=0)
    """transformer blocks at the lowest resolution"""
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    """attention heads of each level"""
    context_dim: int = Field(768, ge=0)
    """width of the text states that cross-attention reads; 0 means no text"""
    pooled_dim: int = Field(0, ge=0)
    """width of a pooled text vector that is added to the time embedding; 0 means none"""
    size_embed_dim: int = Field(0, ge=0, multiple_of=2)
    """width of the embedding of each of six sizes (of a picture, of the cut's corner in it, of the cut), beside the
    vector (Podell et al. 2023, section 2.2); 256 in Stable Diffusion XL, 0 means none"""
    scale_shift_norm: bool = False
    """let the time embedding scale and shift normed features, as in ADM; Stable Diffusion adds it"""
    coord_conv: bool = False
    """tell each place where it is, by two more input channels with x and y (Liu et al. 2018)"""

    @model_validator(mode="after")
    def _check(self) -> "UNetConfig":
        levels = len(self.channel_mult)
        for name, values in (("transformer_depth", self.transformer_depth), ("num_heads", self.num_heads)):
            if len(values) != levels:
                raise ValueError(f"{name} has {len(values)} entries for {levels} levels (channel_mult)")
        check_group_norm(self.widths, name="model_channels x channel_mult")
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(
                    f"{heads} heads do not divide a width of {width}; see model_channels, channel_mult, num_heads"
                )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.model_channels * m for m in self.channel_mult)

    @property
    def factor(self) -> int:
        """The input's sides must be multiples of this."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)


class Block(nn.Module):
    """A residual block, followed by a transformer where the level has one."""

    def __init__(self, channels_in: int, level: int, config: UNetConfig, *, depth: int) -> None:
        super().__init__()
        width = config.widths[level]
        self.residual = ResidualBlock(
            channels_in, width, time_width=4 * config.model_channels, scale_shift=config.scale_shift_norm
        )
        self.transformer = None
        if depth:
            heads, context_width = config.num_heads[level], config.context_dim
            self.transformer = SpatialTransformer(width, depth=depth, heads=heads, context_width=context_width)

    def forward(self, x: Tensor, time: Tensor, context: Context | None, mask: Tensor | None) -> Tensor:
        x = self.residual(x, time)
        return x if self.transformer is None else self.transformer(x, context, mask)


class UNet(nn.Module):
    """Guesses the training target from a noised input, its timestep and a text."""

    def __init__(self, config: UNetConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        widths, time_width = config.widths, 4 * config.model_channels
        last = len(widths) - 1

        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        if vector_width := config.pooled_dim + NUM_SIZE_CONDS * config.size_embed_dim:
            self.vector_embed = nn.Sequential(
                nn.Linear(vector_width, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
            )

        # Encoder.
        planes = (config.in_channels + config.cond_channels) * config.patch_size**2 + (2 if config.coord_conv else 0)
        self.conv_in = nn.Conv2d(planes, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList(Downsample(width) for width in widths[:-1])
        skips, width = [widths[0]], widths[0]
        for level in range(last + 1):
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                blocks.append(Block(width, level, config, depth=config.transformer_depth[level]))
                width = widths[level]
                skips.append(width)
            if level < last:
                skips.append(width)
            self.down.append(blocks)

        # Middle.
        self.middle = nn.ModuleList(
            [Block(width, last, config, depth=config.mid_transformer_depth), Block(width, last, config, depth=0)]
        )

        # Decoder, from the lowest resolution up.
        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList(Upsample(width) for width in widths[:0:-1])
        for level in reversed(range(last + 1)):
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                blocks.append(Block(width + skips.pop(), level, config, depth=config.transformer_depth[level]))
                width = widths[level]
            self.up.append(blocks)

        self.norm_out = group_norm(widths[0], eps=1e-5)
        self.conv_out = zero_init_(nn.Conv2d(widths[0], config.in_channels * config.patch_size**2, 3, padding=1))

    def forward(
        self,
        z: Tensor,
        timestep: Tensor,
        context: Context | None = None,
        mask: Tensor | None = None,
        vector: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """(b, c + extra, h, w), (b,) [, (b, n, context_width), (b, n) bool, (b, vector_width), (b, 6)] -> (b, c, h, w).

        A timestep of shape (1,) is that of all; it may be embedded already, (b or 1, width). `sizes` are in pixels:
        height and width of the picture before it was cut, top and left of the cut in it, height and width of the cut.
        """
        self._check_inputs(z, context, vector, sizes)
        time = timestep if timestep.ndim == 2 else self.embed_timestep(timestep)
        told = [] if vector is None else [vector]
        if sizes is not None:
            told.append(
                timestep_embedding(sizes.flatten(), self.config.size_embed_dim).reshape(len(sizes), -1).to(z.dtype)
            )
        if told:
            time = time + self.vector_embed(torch.cat(told, dim=1))

        # Encoder.
        h = F.pixel_unshuffle(z, self.config.patch_size)
        h = self.conv_in(add_coord_channels(h) if self.config.coord_conv else h)
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block in cast(nn.ModuleList, blocks):
                h = self._run(block, h, time, context, mask)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)

        # Middle.
        for block in self.middle:
            h = self._run(block, h, time, context, mask)

        # Decoder.
        for level, blocks in enumerate(self.up):
            for block in cast(nn.ModuleList, blocks):
                h = self._run(block, torch.cat([h, skips.pop()], dim=1), time, context, mask)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.config.patch_size)

    def embed_timestep(self, timestep: Tensor) -> Tensor:
        """(b,) -> (b, width): what every residual block is told of the time."""
        return self.time_embed(timestep_embedding(timestep, self.config.model_channels).to(self.conv_in.weight.dtype))

    def _run(self, block: nn.Module, *inputs: Context | None) -> Tensor:
        return checkpointed(block, *inputs, recompute=self.gradient_checkpointing)

    def _check_inputs(self, z: Tensor, context: Context | None, vector: Tensor | None, sizes: Tensor | None) -> None:
        config = self.config
        if z.shape[1] != config.in_channels + config.cond_channels:
            raise ValueError(f"the U-Net takes {config.in_channels + config.cond_channels} channels, not {z.shape[1]}")
        if any(side % config.factor for side in z.shape[-2:]):
            raise ValueError(f"the U-Net's input of {tuple(z.shape[-2:])} is not a multiple of {config.factor}")
        for name, value, width in (
            ("context", context, config.context_dim),
            ("vector", vector, config.pooled_dim),
            ("row of sizes", sizes, NUM_SIZE_CONDS if config.size_embed_dim else 0),
        ):
            if (value is None) != (width == 0) or (value is not None and value.shape[-1] != width):
                found = "none" if value is None else f"width {value.shape[-1]}"
                raise ValueError(f"the U-Net takes a {name} of width {width} (0: none), got {found}")


def add_coord_channels(x: Tensor) -> Tensor:
    """Append two channels that run from -1 to 1 along the width and the height."""
    b, _, height, width = x.shape
    column, row = (torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in (width, height))
    return torch.cat([x, column.expand(b, 1, height, width), row[:, None].expand(b, 1, height, width)], dim=1)
