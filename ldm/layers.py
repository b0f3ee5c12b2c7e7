"""Layers that the VAE and the U-Net share."""

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


def check_group_norm(widths: tuple[int, ...], *, name: str) -> None:
    """ValueError unless GroupNorm's 32 groups divide every width."""
    for width in widths:
        if width % 32:
            raise ValueError(f"{name} gives a width of {width}, which 32 normalization groups do not divide")


def checkpointed(block: nn.Module, *inputs: Any, recompute: bool) -> Tensor:
    """Call a block; with `recompute` its activations are not kept for the backward pass but computed again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
