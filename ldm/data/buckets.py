"""Buckets: heights and widths of about one area and many shapes; each image is assigned to the most similar one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.data.transforms import Sides

MAX_ASPECT_RATIO = 4.0  # the longest side over the shortest, as in Stable Diffusion XL (Podell et al. 2023, appendix I)
MIN_BUCKET_IMAGES = 32  # images that make a bucket; those of a smaller one go to the next


def bucket_resolutions(size: int, step: int) -> list[Sides]:
    """All sides that are multiples of `step`, with the largest area that is not above that of a square of `size`.

    ValueError when `size` is not a multiple of `step`, so that the square would be missing.
    """
    if size % step:
        raise ValueError(f"data.resolution {size} is not a multiple of data.bucket_step {step}: choose one that is")
    wide = {(size * size // width // step * step, width) for width in range(size, int(size * MAX_ASPECT_RATIO), step)}
    wide = {(height, width) for height, width in wide if height and width <= MAX_ASPECT_RATIO * height}
    return sorted(wide | {(width, height) for height, width in wide})


def assign_buckets(sizes: Sequence[Sides], resolutions: Sequence[Sides]) -> tuple[list[Sides], Tensor]:
    """The resolutions in use for images of these sizes, and for each image the index of its own, (n,) int64.

    It is the one whose ratio of width and height is nearest, in logarithms. A bucket needs 32 images, or, where none
    has 32, half of what the largest has. The square needs none, so no image is cut more than without buckets.
    """
    ratios = torch.tensor([math.log(width / height) for height, width in sizes])
    counts = _nearest(ratios, resolutions).bincount(minlength=len(resolutions))
    largest = int(counts.max())
    enough = counts >= (MIN_BUCKET_IMAGES if largest >= MIN_BUCKET_IMAGES else largest / 2)
    square = torch.tensor([height == width for height, width in resolutions])
    candidates = [resolutions[i] for i in (enough | square).nonzero().flatten().tolist()]
    used, groups = _nearest(ratios, candidates).unique(return_inverse=True)
    return [candidates[i] for i in used.tolist()], groups


def _nearest(ratios: Tensor, resolutions: Sequence[Sides]) -> Tensor:
    """The index of the resolution that is nearest to each logarithm of width / height."""
    centers = torch.tensor([math.log(width / height) for height, width in resolutions])
    order = centers.argsort()
    return order[torch.bucketize(ratios, (centers[order][1:] + centers[order][:-1]) / 2)]
