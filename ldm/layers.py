"""Layers that networks share."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def zero_init_(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Zero the weights, so that the residual branch which the layer ends starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def check_group_norm(groups: dict[int, int], *, widths: str) -> None:
    """ValueError unless `groups`, from width to number of norm groups, divide the widths, the settings `widths`."""
    for width, count in groups.items():
        if count < 1 or width % count:
            fits = f"set other widths, or a divisor of {math.gcd(*groups)}"
            raise ValueError(f"norm_num_groups: {count} groups do not divide a width of {width} ({widths}); {fits}")


def checkpointed(block: nn.Module, *inputs: Any, recompute: bool) -> Tensor:
    """Call a block; with `recompute` its activations are recomputed in the backward pass (Chen et al. 2016)."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class GroupNorm(nn.GroupNorm):
    """GroupNorm whose output is in the precision of its input: CUDA's autocast would return float32.

    That takes twice the memory and its traffic, for activations that the next layer rounds. Kernels add in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _cuda_autocasts(x):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose output is in the precision of its input, as `GroupNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _cuda_autocasts(x):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _cuda_autocasts(x: Tensor) -> bool:
    return x.is_cuda and torch.is_autocast_enabled("cuda")


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution: (b, c, h, w) -> (b, c, 2 h, 2 w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in the precision of x, as `GroupNorm`
            larger = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(larger)
