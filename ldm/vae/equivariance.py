"""Scaled and turned latents, which shall decode to the scaled and turned image (EQ-VAE, Kouzelis et al. 2025)."""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SCALE = 0.25  # as in the paper


class ScaleTurn(NamedTuple):
    """A new size, then quarter turns."""

    height: int  # in latent cells
    width: int
    turns: int = 0

    def __call__(self, x: Tensor, *, factor: int = 1) -> Tensor:
        """Of latents (b, c, h, w), or of images with `factor` pixels for each cell."""
        size = (self.height * factor, self.width * factor)
        if size != x.shape[-2:]:
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        return torch.rot90(x, self.turns, (2, 3))


def draw_scale_turn(draw: random.Random, height: int, width: int, *, smallest: int) -> ScaleTurn:
    """A scale from a quarter to 1 and one of four directions, for latents (h, w) with sides of at least `smallest`."""
    scale = max(draw.uniform(MIN_SCALE, 1), smallest / min(height, width))
    height, width = (min(side, round(side * scale)) for side in (height, width))
    return ScaleTurn(height, width, draw.randrange(4))
