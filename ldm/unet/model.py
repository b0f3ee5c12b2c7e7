"""The U-Net with cross-attention (Rombach et al. 2022, section 3.3), up to the exact Stable Diffusion ones."""

from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.config import Config
from ldm.layers import GroupNorm, Upsample, check_group_norm, checkpointed, zero_init_
from ldm.unet.blocks import Context, Downsample, Refinement, ResidualBlock, SpatialTransformer, timestep_embedding

NUM_SIZE_CONDS = 6  # original height and width, crop top and left, height and width
UNCONDITIONAL = Conditioning()


class UNetConfig(Config):
    """The defaults are the Stable Diffusion 1.5 U-Net: 859,520,964 parameters."""

    in_channels: int = Field(4, ge=1)
    """channels of z_t and of the prediction"""
    cond_channels: int = Field(0, ge=0)
    """channels of a spatial condition that is concatenated to z_t; 5 for inpainting: mask and masked latents"""
    patch_size: int = Field(1, ge=1)
    """side of the blocks that are folded into channels before the first convolution"""
    model_channels: int = Field(320, ge=2, multiple_of=2)
    """width of the first level"""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """width of each level as a multiple of `model_channels`; each further level halves the resolution"""
    num_res_blocks: int = Field(2, ge=1)
    """residual blocks of a level in the encoder; the decoder has one more"""
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    """transformer blocks after each residual block of a level; 0 means no attention there"""
    mid_transformer_depth: int = Field(1, ge=0)
    """transformer blocks at the lowest resolution"""
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    """attention heads of each level"""
    context_dim: int = Field(768, ge=0)
    """width of the text states for cross-attention; 0 means no text"""
    pooled_dim: int = Field(0, ge=0)
    """width of a pooled text vector that is added to the time embedding; 0 means none"""
    size_embed_dim: int = Field(0, ge=0, multiple_of=2)
    """width of the embedding of each of six sizes (original height and width, crop top and left, height and width) that
    are added like the pooled vector (Podell et al. 2023, section 2.2); 256 in Stable Diffusion XL, 0 means none"""
    scale_shift_norm: bool = False
    """let the time embedding scale and shift normed features, as in ADM; Stable Diffusion adds it"""
    coord_conv: bool = False
    """append the coordinates x and y to the input as two more channels (Liu et al. 2018)"""
    refine_channels: int = Field(0, ge=0)
    """width of three convolutions at the resolution of z that correct the prediction, from z and the prediction itself;
    0 means none. A network whose patches hold more numbers than its layers have channels cannot copy what it sees"""
    norm_num_groups: int = Field(32, ge=1)
    """groups of each GroupNorm"""
    norm_min_group_channels: int = Field(1, ge=1)
    """least channels of a norm group, so a layer of c channels has at most c // norm_min_group_channels groups. Recipes
    with less than 256 channels set 8: norms over one or two channels remove most of the time embedding, which is one
    number for each channel. Stable Diffusion has 1"""

    @model_validator(mode="after")
    def _check(self) -> "UNetConfig":
        levels = len(self.channel_mult)
        for name, values in (("transformer_depth", self.transformer_depth), ("num_heads", self.num_heads)):
            if len(values) != levels:
                raise ValueError(f"{name} has {len(values)} entries for {levels} levels (channel_mult)")
        check_group_norm(self.norm_groups, widths="model_channels x channel_mult, in the decoder plus skips")
        depths = (*self.transformer_depth[:-1], self.transformer_depth[-1] + self.mid_transformer_depth)
        for width, heads, depth in zip(self.widths, self.num_heads, depths, strict=True):
            if heads < 1 or (depth and width % heads):
                raise ValueError(
                    f"num_heads: {heads} heads do not divide a width of {width} (model_channels x channel_mult)"
                )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * m for m in self.channel_mult)

    @property
    def factor(self) -> int:
        """The input's sides must be multiples of this."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    @property
    def decoder_inputs(self) -> list[list[int]]:
        """Channels into each block of the decoder, with its skip, by level from the lowest resolution up."""
        skips = [self.widths[0]]  # of the input convolution, then of each block and downsampling
        for level, width in enumerate(self.widths):
            skips += [width] * (self.num_res_blocks + (level < len(self.widths) - 1))
        width, inputs = self.widths[-1], []
        for level_width in reversed(self.widths):
            inputs.append([width + skips.pop(), *(level_width + skips.pop() for _ in range(self.num_res_blocks))])
            width = level_width
        return inputs

    def num_groups(self, channels: int) -> int:
        """Groups of the GroupNorm of a layer."""
        return min(self.norm_num_groups, channels // self.norm_min_group_channels)

    @property
    def norm_groups(self) -> dict[int, int]:
        """From each width that is normed to its number of groups."""
        return {width: self.num_groups(width) for width in chain(self.widths, *self.decoder_inputs)}


class Block(nn.Module):
    """A residual block, followed by a transformer where `depth` is above 0."""

    def __init__(self, channels_in: int, level: int, config: UNetConfig, *, depth: int) -> None:
        super().__init__()
        width, time_width, num_groups = config.widths[level], 4 * config.model_channels, config.num_groups
        self.residual = ResidualBlock(
            channels_in, width, time_width=time_width, scale_shift=config.scale_shift_norm, num_groups=num_groups
        )
        self.transformer = None
        if depth:
            num_heads, context_dim = config.num_heads[level], config.context_dim
            self.transformer = SpatialTransformer(
                width, depth=depth, num_heads=num_heads, context_dim=context_dim, num_groups=num_groups
            )

    def forward(self, x: Tensor, t_embed: Tensor, context: Context | None, mask: Tensor | None) -> Tensor:
        """x (b, c, h, w), t_embed (b or 1, width), context (b, n, context_dim), mask (b, n) bool."""
        x = self.residual(x, t_embed)
        return x if self.transformer is None else self.transformer(x, context, mask)


class UNet(nn.Module):
    """Predicts the training target from a noised input, its timestep and its conditions."""

    cpu_layout = torch.contiguous_format  # in which its small maps are faster there: docs/performance.md

    def __init__(self, config: UNetConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, gradient_checkpointing
        widths, depths, time_width = config.widths, config.transformer_depth, 4 * config.model_channels
        last = len(widths) - 1

        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        if vector_dim := config.pooled_dim + NUM_SIZE_CONDS * config.size_embed_dim:
            self.vector_embed = nn.Sequential(
                nn.Linear(vector_dim, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
            )

        # Encoder.
        channels_in = (config.in_channels + config.cond_channels) * config.patch_size**2 + 2 * config.coord_conv
        self.conv_in = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList(Downsample(width) for width in widths[:-1])
        for level in range(last + 1):
            inputs = [widths[max(level - 1, 0)], *[widths[level]] * (config.num_res_blocks - 1)]
            self.down.append(nn.ModuleList(Block(width, level, config, depth=depths[level]) for width in inputs))

        # Middle.
        self.middle = nn.ModuleList(
            Block(widths[last], last, config, depth=depth) for depth in (config.mid_transformer_depth, 0)
        )

        # Decoder, from the lowest resolution up.
        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList(Upsample(width) for width in widths[:0:-1])
        for level, inputs in zip(range(last, -1, -1), config.decoder_inputs, strict=True):
            self.up.append(nn.ModuleList(Block(width, level, config, depth=depths[level]) for width in inputs))

        self.norm_out = GroupNorm(config.num_groups(widths[0]), widths[0], eps=1e-5)
        self.conv_out = zero_init_(nn.Conv2d(widths[0], config.in_channels * config.patch_size**2, 3, padding=1))
        if config.refine_channels:
            self.refine = Refinement(config.in_channels, config.refine_channels, time_width)

    def forward(self, z: Tensor, timestep: Tensor, cond: Conditioning = UNCONDITIONAL) -> Tensor:
        """z (b, in_channels, h, w) at the network's timestep (b,) or (1,) -> prediction (b, in_channels, h, w).

        ValueError: sides that the factor does not divide, and channels or conditions of other widths than configured.
        """
        return self.with_features(z, timestep, cond)[0]

    def with_features(self, z: Tensor, timestep: Tensor, cond: Conditioning = UNCONDITIONAL) -> tuple[Tensor, Tensor]:
        """The prediction, and the features after the middle: (b, widths[-1], h / factor, w / factor)."""
        self._check_inputs(z, cond)
        t_embed = self._embed(timestep, cond, z)
        context, mask = cond.context, cond.context_mask

        # Encoder.
        h = self.conv_in(self._fold_inputs(z, cond.spatial))
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block in cast(nn.ModuleList, blocks):
                h = self._run(block, h, t_embed, context, mask)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)

        # Middle.
        for block in self.middle:
            h = self._run(block, h, t_embed, context, mask)
        features = h

        # Decoder.
        for level, blocks in enumerate(self.up):
            for block in cast(nn.ModuleList, blocks):
                h = self._run(block, torch.cat([h, skips.pop()], dim=1), t_embed, context, mask)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        prediction = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.config.patch_size)
        if self.config.refine_channels:
            prediction = prediction + self.refine(prediction, z, t_embed)
        return prediction, features

    def _embed(self, timestep: Tensor, cond: Conditioning, z: Tensor) -> Tensor:
        """The time embedding (b or 1, 4 model_channels), to which the pooled vector and the sizes are added."""
        embedded = timestep_embedding(timestep, self.config.model_channels)
        t_embed = self.time_embed(embedded.to(self.conv_in.weight.dtype))
        parts = [] if cond.pooled is None else [cond.pooled]
        if cond.sizes is not None:
            embedded = timestep_embedding(cond.sizes.flatten(), self.config.size_embed_dim)
            parts.append(embedded.reshape(len(cond.sizes), -1).to(z.dtype).expand(len(z), -1))
        return t_embed + self.vector_embed(torch.cat(parts, dim=1)) if parts else t_embed

    def _fold_inputs(self, z: Tensor, spatial: Tensor | None) -> Tensor:
        """Input of the first convolution: z, coordinates, and last the spatial condition, which fine-tuning may add."""
        h = F.pixel_unshuffle(z, self.config.patch_size)
        h = add_coord_channels(h) if self.config.coord_conv else h
        if spatial is None:
            return h
        return torch.cat([h, F.pixel_unshuffle(spatial.expand(len(z), -1, -1, -1), self.config.patch_size)], dim=1)

    def _run(self, block: nn.Module, *inputs: Context | None) -> Tensor:
        return checkpointed(block, *inputs, recompute=self.gradient_checkpointing)

    def _check_inputs(self, z: Tensor, cond: Conditioning) -> None:
        config, (channels, height, width) = self.config, z.shape[1:]
        if channels != config.in_channels:
            raise ValueError(f"z: expected {config.in_channels} channels (unet.in_channels), got {channels}")
        if height % config.factor or width % config.factor:
            raise ValueError(f"z: expected sides that are multiples of {config.factor}, got {height} x {width}")
        for name, value, dim, expected in (
            ("context", cond.context, -1, config.context_dim),
            ("pooled", cond.pooled, -1, config.pooled_dim),
            ("sizes", cond.sizes, -1, NUM_SIZE_CONDS if config.size_embed_dim else 0),
            ("spatial", cond.spatial, 1, config.cond_channels),
        ):
            got = 0 if value is None else value.shape[dim]
            if got != expected:
                raise ValueError(f"Conditioning.{name}: expected width {expected}, got {got} (0: none)")


def add_coord_channels(x: Tensor) -> Tensor:
    """Append two channels that run from -1 to 1 along the width and the height: (b, c, h, w) -> (b, c + 2, h, w)."""
    b, _, height, width = x.shape
    column, row = (torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in (width, height))
    return torch.cat([x, column.expand(b, 1, height, width), row[:, None].expand(b, 1, height, width)], dim=1)
