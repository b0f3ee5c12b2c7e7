"""Decode a large latent tile by tile, so that memory does not grow with the image."""

from collections.abc import Callable

import torch
from torch import Tensor


def tiled_decode(decode: Callable[[Tensor], Tensor], latents: Tensor, *, factor: int, tile: int) -> Tensor:
    """Decode (b, c, h, w) -> (b, c, factor h, factor w) in tiles of this side, blended where a quarter overlaps.

    Norms over the whole image make tiles slightly different; blending leaves no seam. ValueError: a tile below 2.
    """
    if tile < 2:
        raise ValueError(f"vae_tile must be at least 2 latents, not {tile}")
    height, width = latents.shape[-2:]
    overlap = max(tile // 4, 1)
    result: Tensor | None = None
    total = latents.new_zeros(1, 1, factor * height, factor * width)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            piece = decode(latents[..., top : top + tile, left : left + tile])
            if result is None:
                result = piece.new_zeros(*piece.shape[:2], factor * height, factor * width)
            weight = _ramp(piece.shape[-2], factor * overlap)[:, None] * _ramp(piece.shape[-1], factor * overlap)
            rows = slice(factor * top, factor * top + piece.shape[-2])
            columns = slice(factor * left, factor * left + piece.shape[-1])
            result[..., rows, columns] += weight.to(piece) * piece
            total[..., rows, columns] += weight.to(total)
    assert result is not None
    return result / total


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """First row or column of each tile; the last tile ends with the side."""
    last = max(side - tile, 0)
    return [*range(0, last, tile - overlap), last]


def _ramp(length: int, overlap: int) -> Tensor:
    """Blending weights (length,), which rise from both ends over `overlap` pixels and are never 0."""
    from_start = torch.arange(1, length + 1)
    return torch.minimum(from_start, from_start.flip(0)).clamp_max(overlap) / overlap
