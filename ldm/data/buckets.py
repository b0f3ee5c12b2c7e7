"""Buckets: sides of about one area and many shapes, of which each image takes the one that is most like it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_ASPECT_RATIO = 4.0  # the longest side over the shortest, as in Stable Diffusion XL (Podell et al. 2023, appendix I)
MIN_BUCKET_IMAGES = 32  # images that make a bucket; those of a smaller one go to the next

Sides = tuple[int, int]  # height and width, in pixels


def bucket_resolutions(size: int, step: int) -> list[Sides]:
    """All sides that are multiples of `step`, with the largest area that is not above that of a square of `size`.

    ValueError when `size` is no multiple of `step`, so that the square would be missing.
    """
    if size % step:
        raise ValueError(f"data.resolution {size} is not a multiple of data.bucket_step {step}: choose one that is")
    wide = {(size * size // width // step * step, width) for width in range(size, int(size * MAX_ASPECT_RATIO), step)}
    wide = {(height, width) for height, width in wide if height and width <= MAX_ASPECT_RATIO * height}
    return sorted(wide | {(width, height) for height, width in wide})


def assign_buckets(shapes: Sequence[Sides], sides: Sequence[Sides]) -> tuple[list[Sides], Tensor]:
    """The buckets in use for images of these heights and widths, and the number of the bucket of each image.

    It is the one whose ratio of width and height is nearest, in logarithms. Where none has 32 images, half of what the
    largest has is enough.
    """
    wanted = torch.tensor([math.log(width / height) for height, width in shapes])
    nearest = _nearest(wanted, sides)
    counts = nearest.bincount(minlength=len(sides))
    most = int(counts.max())
    kept = (counts >= (MIN_BUCKET_IMAGES if most >= MIN_BUCKET_IMAGES else most / 2)).nonzero().flatten().tolist()
    used = [sides[i] for i in kept]
    return used, _nearest(wanted, used)


def _nearest(ratios: Tensor, sides: Sequence[Sides]) -> Tensor:
    """The index of the sides that are nearest to each logarithm of a ratio."""
    own = torch.tensor([math.log(width / height) for height, width in sides])
    order = own.argsort()
    return order[torch.bucketize(ratios, (own[order][1:] + own[order][:-1]) / 2)]
