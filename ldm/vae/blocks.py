"""Building blocks of the VAE: residual block, attention over pixels, downsampling."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.layers import GroupNorm


def group_norm(num_groups: int, channels: int) -> GroupNorm:
    """GroupNorm with the epsilon of the Stable Diffusion VAE."""
    return GroupNorm(num_groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two GroupNorm -> SiLU -> 3x3 convolutions with a shortcut: (b, in, h, w) -> (b, out, h, w)."""

    def __init__(self, channels_in: int, channels_out: int, *, num_groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(num_groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(num_groups, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels with a residual connection: (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int, *, num_groups: int) -> None:
        super().__init__()
        self.norm = group_norm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out(h), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded right and below only, as Stable Diffusion's: (b, c, h / 2, w / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def mid_block(channels: int, *, attention: bool, num_groups: int) -> nn.Sequential:
    """The blocks at the lowest resolution: (b, c, h, w) -> (b, c, h, w)."""
    between = [Attention(channels, num_groups=num_groups)] if attention else []  # first, for the order of random draws
    first, last = (ResidualBlock(channels, channels, num_groups=num_groups) for _ in range(2))
    return nn.Sequential(first, *between, last)
