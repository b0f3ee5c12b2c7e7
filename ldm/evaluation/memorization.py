"""Whether a model repeats its training images: how near samples are to them, and how near held-out images are.

Source: Meehan et al. 2020, who test the two sets of distances against each other, so that no threshold is invented.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm.evaluation.estimates import Estimate, proportion_ci
from ldm.imaging import captioned_grid, tensor_to_pil

Embed = Callable[[Tensor], Tensor]  # images (b, c, h, w) in [-1, 1] -> vectors (b, d) on the CPU
PERCENTILES = (1, 5)  # of the distances of held-out images, each of which needs 100 / percentile of them


class Nearest(NamedTuple):
    """The nearest training image of each image of a set."""

    distances: Tensor  # (n,), root of the mean squared difference
    indices: Tensor  # (n,), in the training images


class Memorization(NamedTuple):
    """Distances of samples to their nearest training image, against those of held-out images."""

    nearer: dict[int, Estimate]  # share of samples nearer than this percentile of held-out images
    auc: float  # probability that a sample is nearer than a held-out image: 1/2 where nothing is memorized
    p_value: float  # of so large an `auc`, where samples are no nearer than held-out images

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        nearer = {f"nearer_than_{percent}_percent": share._asdict() for percent, share in self.nearer.items()}
        return {**nearer, "auc": self.auc, "p_value": self.p_value}

    @property
    def is_evident(self) -> bool:
        """Whether chance does not explain how many samples are near."""
        return any(share.low > percent / 100 for percent, share in self.nearer.items())


def find_nearest(
    sets: Mapping[str, Tensor], training: Iterable[Tensor], spaces: Mapping[str, Embed]
) -> dict[str, dict[str, Nearest]]:
    """The nearest of the training images, which come in batches, in each space: found[space][set]."""
    points = {space: {name: embed(images) for name, images in sets.items()} for space, embed in spaces.items()}
    found = {
        space: {name: Nearest(torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.long))
                for name, x in of_sets.items()}
        for space, of_sets in points.items()
    }  # fmt: skip
    first = 0
    for batch in training:
        for space, embed in spaces.items():
            candidates = embed(batch)
            for name, x in points[space].items():
                found[space][name] = _nearer(found[space][name], x, candidates, first)
        first += len(batch)
    return found


def _nearer(before: Nearest, x: Tensor, candidates: Tensor, first: int) -> Nearest:
    """The nearest so far, or of these candidates, the first of which is training image `first`."""
    exact = torch.cdist(x, candidates, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])
    distances, indices = exact.min(1)
    closer = distances < before.distances
    return Nearest(
        torch.where(closer, distances, before.distances), torch.where(closer, indices + first, before.indices)
    )


def compare_distances(samples: Tensor, held_out: Tensor) -> Memorization:
    """From the distances of samples (n,) and of held-out images (m,) to their nearest training image."""
    enough = [percent for percent in PERCENTILES if len(held_out) * percent >= 100]
    limits = {percent: held_out.quantile(percent / 100) for percent in enough}
    nearer = {percent: proportion_ci(int((samples < limit).sum()), len(samples)) for percent, limit in limits.items()}
    return Memorization(nearer, *rank_test(samples, held_out))


def rank_test(small: Tensor, large: Tensor) -> tuple[float, float]:
    """The probability that a number of `small` (n,) is below one of `large` (m,), and its p-value against 1/2.

    The one-sided test of Mann and Whitney 1947, by its normal approximation, where equal numbers count half.
    """
    n, m = len(small), len(large)
    _, inverse, counts = torch.cat([small, large]).unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]  # equal numbers share their mean rank
    auc = 1 - (float(ranks[:n].sum()) - n * (n + 1) / 2) / (n * m)
    ties = float((counts.double() ** 3 - counts).sum()) / ((n + m) * (n + m - 1))
    deviation = math.sqrt(max((n + m + 1 - ties) / (12 * n * m), 1e-12))
    return auc, math.erfc((auc - 0.5) / deviation / math.sqrt(2)) / 2


def closest_pairs(
    samples: Tensor, nearest: Nearest, held_out: Tensor, read: Callable[[Sequence[int]], Tensor], *, count: int = 8
) -> Image.Image:
    """The samples that are nearest to a training image, each above its own; `read` gives training images by index.

    Below: the distance, and how many of the distances of held-out images (m,) are smaller.
    """
    by_distance = nearest.distances.argsort().tolist()
    firsts = {int(nearest.indices[i]): i for i in reversed(by_distance)}  # the nearest sample of each training image
    order = torch.tensor(sorted(firsts.values(), key=by_distance.index)[:count])
    below = [f"{(held_out < d).float().mean():.0%}" for d in nearest.distances[order]]
    pairs = zip(nearest.distances[order].tolist(), below, strict=True)
    labels = [f"distance {distance:.3f}; {share} of held-out images are nearer" for distance, share in pairs]
    training = tensor_to_pil(read(nearest.indices[order].tolist()))
    titles = [f"sample {i}" for i in order.tolist()] + [f"its nearest training image: {label}" for label in labels]
    return captioned_grid(tensor_to_pil(samples[order]) + training, titles, columns=len(order))
