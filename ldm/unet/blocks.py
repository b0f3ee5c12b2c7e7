"""Building blocks of the U-Net: time embedding, residual block, transformer, downsampling."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioning import CachedContext
from ldm.layers import GroupNorm, LayerNorm, zero_init_

Context = Tensor | CachedContext
NumGroups = Callable[[int], int]  # from the width of a layer to its number of norm groups


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """Cosines, then sines, at frequencies 1 to 1e-4 (Vaswani et al. 2017, section 3.5): (b,) -> (b, width) float32."""
    half = width // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResidualBlock(nn.Module):
    """Two GroupNorm -> SiLU -> 3x3 convolutions, with the time embedding between them: (b, in, h, w) -> (b, out, h, w).

    The embedding is added, or scales and shifts the second norm (`scale_shift`; Dhariwal and Nichol 2021, section 3).
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, time_width: int, scale_shift: bool, num_groups: NumGroups
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(num_groups(channels_in), channels_in, eps=1e-5)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_proj = nn.Linear(time_width, (2 if scale_shift else 1) * channels_out)
        self.norm2 = GroupNorm(num_groups(channels_out), channels_out, eps=1e-5)
        self.conv2 = zero_init_(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, t_embed: Tensor) -> Tensor:
        """`t_embed` is (b or 1, time_width)."""
        h = self.conv1(F.silu(self.norm1(x)))
        embedded = self.time_proj(F.silu(t_embed))[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + embedded)
        return self.shortcut(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Multi-head attention from x (b, n, c) to a context (b, m, d), or to x itself without one: (b, n, c)."""

    def __init__(self, channels: int, *, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Context | None = None, mask: Tensor | None = None) -> Tensor:
        """`mask` (b, m) is True where the context may be attended to."""
        context = x if context is None else context
        k, v = context.kv(self.project_kv) if isinstance(context, CachedContext) else self.project_kv(context)
        mask = None if mask is None else mask[:, None, None, :]
        h = F.scaled_dot_product_attention(self._by_head(self.to_q(x)), k, v, attn_mask=mask)
        return self.to_out(rearrange(h, "b heads n d -> b n (heads d)"))

    def project_kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context (b, m, d): (b, heads, m, c / heads) each."""
        return self._by_head(self.to_k(context)), self._by_head(self.to_v(context))

    def _by_head(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (heads d) -> b heads n d", heads=self.num_heads)


class GEGLU(nn.Module):
    """Gated linear unit with an (erf) GELU gate (Shazeer 2020, equation 6): (..., c) -> (..., hidden)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention (where there is a context) and a feed-forward network."""

    def __init__(self, channels: int, *, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads=num_heads)
        if context_dim:
            self.norm2 = LayerNorm(channels)
            self.cross_attention = Attention(channels, num_heads=num_heads, context_dim=context_dim)
        self.norm3 = LayerNorm(channels)
        self.feed_forward = nn.Sequential(GEGLU(channels, 4 * channels), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor, context: Context | None, mask: Tensor | None) -> Tensor:
        """x (b, n, c), context (b, m, context_dim), mask (b, m) bool -> (b, n, c)."""
        x = x + self.self_attention(self.norm1(x))
        if context is not None:
            x = x + self.cross_attention(self.norm2(x), context, mask)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual connection: (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int, *, depth: int, num_heads: int, context_dim: int, num_groups: NumGroups) -> None:
        super().__init__()
        self.norm = GroupNorm(num_groups(channels), channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads=num_heads, context_dim=context_dim) for _ in range(depth)
        )
        self.proj_out = zero_init_(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Context | None, mask: Tensor | None) -> Tensor:
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.blocks:
            h = block(h, context, mask)
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (b, c, h, w) -> (b, c, h / 2, w / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Refinement(nn.Module):
    """A correction of a prediction from what the network was given, at full resolution; it starts as 0."""

    def __init__(self, channels: int, width: int, time_width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = zero_init_(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, prediction: Tensor, z: Tensor, t_embed: Tensor) -> Tensor:
        """prediction and z (b, c, h, w), t_embed (b or 1, width) -> (b, c, h, w)."""
        scale, shift = self.time(F.silu(t_embed))[..., None, None].chunk(2, dim=1)
        h = self.conv_in(torch.cat([prediction, z], dim=1)) * (1 + scale) + shift
        return self.conv_out(F.silu(self.conv(F.silu(h))))
