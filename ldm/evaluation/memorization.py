"""Whether a model repeats its training images: how near samples are to them, and how near held-out images are.

Source: Meehan et al. 2020, who test the two sets of distances against each other, so that no threshold is invented.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.inspect import find_duplicates, max_difference, signature
from ldm.data.loader import sample_batches
from ldm.evaluation.estimates import Estimate, proportion_ci
from ldm.evaluation.features import extract
from ldm.evaluation.subject import Subject
from ldm.imaging import captioned_grid, tensor_to_pil
from ldm.io.atomic import write_text

Embed = Callable[[Tensor], Tensor]  # images (b, c, h, w) in [-1, 1] -> vectors (b, d) on the CPU
SIGNIFICANT = 1e-3  # a p-value that is reported as evidence: there are up to nine in a report
PERCENTILES = {1: 100, 5: 20}  # of the distances of held-out images, and how many of these each needs


class Nearest(NamedTuple):
    """The nearest training image of each image of a set."""

    distances: Tensor  # (n,), root of the mean squared difference
    indices: Tensor  # (n,), in the training images


class Share(NamedTuple):
    """How many samples are nearer to the training images than a percentile of held-out images."""

    share: Estimate
    p_value: float  # of so large a share, where samples are no nearer than held-out images


class Memorization(NamedTuple):
    """Distances of samples to their nearest training image, against those of held-out images."""

    nearer: dict[int, Share]  # than this percentile of held-out images
    auc: float  # probability that a sample is nearer than a held-out image: 1/2 where nothing is memorized
    p_value: float  # of so large an `auc`

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        shares = {
            f"nearer_than_{percent}_percent": {**found.share._asdict(), "p_value": found.p_value}
            for percent, found in self.nearer.items()
        }
        return {**shares, "auc": self.auc, "p_value": self.p_value}

    @property
    def is_evident(self) -> bool:
        """Whether chance does not explain how near the samples are, all of them or the nearest."""
        return min(self.p_value, *(found.p_value for found in self.nearer.values()), 1.0) < SIGNIFICANT


def find_nearest(
    sets: Mapping[str, Tensor], training: Iterable[Tensor], spaces: Mapping[str, Embed]
) -> dict[str, dict[str, Nearest]]:
    """The nearest of the training images, which come in batches, in each space: found[space][set]."""
    points = {space: {name: embed(images).double() for name, images in sets.items()} for space, embed in spaces.items()}
    found = {
        space: {name: Nearest(torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.long))
                for name, x in of_sets.items()}
        for space, of_sets in points.items()
    }  # fmt: skip
    first = 0
    for batch in training:
        for space, embed in spaces.items():
            candidates = embed(batch).double()
            for name, x in points[space].items():
                found[space][name] = _nearer(found[space][name], x, candidates, first)
        first += len(batch)
    return found


def _nearer(before: Nearest, x: Tensor, candidates: Tensor, first: int) -> Nearest:
    """The nearest so far, or of these candidates, the first of which is training image `first`."""
    indices = torch.cdist(x, candidates).argmin(1)  # as a matrix product, which is fast, but rounds distances near 0
    distances = (x - candidates[indices]).square().mean(1).sqrt().float()
    closer = distances < before.distances
    return Nearest(
        torch.where(closer, distances, before.distances), torch.where(closer, indices + first, before.indices)
    )


def compare_distances(samples: Tensor, held_out: Tensor) -> Memorization:
    """From the distances of samples (n,) and of held-out images (m,) to their nearest training image."""
    enough = [percent for percent, least in PERCENTILES.items() if len(held_out) >= least]
    return Memorization({p: share_nearer(samples, held_out, p) for p in enough}, *rank_test(samples, held_out))


def missing_percentiles(held_out: int) -> list[str]:
    """A note for each percentile that needs more than so many held-out images."""
    return [
        f"memorization: the nearest {percent} % need at least {least} held-out images; there are {held_out}"
        for percent, least in PERCENTILES.items()
        if held_out < least
    ]


def share_nearer(samples: Tensor, held_out: Tensor, percent: int) -> Share:
    """How many samples (n,) are below the k-th of the held-out distances (m,), where k / m is this percentile.

    Where both are alike their order is random, so the p-value is exact, and also knows that the percentile is a guess
    from m images: it is the chance that fewer than k of the first (count + k - 1) are held-out images.
    """
    n, m, k = len(samples), len(held_out), len(held_out) * percent // 100
    count = int((samples < held_out.sort().values[k - 1]).sum())
    first = count + k - 1
    ways = sum(math.comb(m, j) * math.comb(n, first - j) for j in range(min(k, first + 1)))
    return Share(proportion_ci(count, n), ways / math.comb(n + m, first))


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


# In a model.


def search_training(
    subject: Subject, generated: Tensor, max_images: int
) -> tuple[dict[str, dict[str, Nearest]], dict[str, Any], Image.Image]:
    """Of generated images (n, c, h, w): what is nearest in each space, duplicates in training data, the closest pairs.

    What is nearest is that of "samples" and of "held-out images". At most `max_images` training images are searched.
    """
    training = subject.training
    indices = training.source.evenly_spaced(max_images)
    signatures: list[NDArray[np.int16]] = []

    def batches() -> Iterator[Tensor]:
        for batch in tqdm(sample_batches(training, indices), "training images", -(-len(indices) // 64), unit="batch"):
            signatures.extend(map(signature, tensor_to_pil(batch["image"])))
            yield batch["image"]

    sets = {"samples": generated, "held-out images": subject.images}
    nearest = find_nearest(sets, batches(), spaces(subject))
    alike = find_duplicates(signatures, max_difference(training.source))
    groups = [[training.source.names[indices[i]] for i in group] for group in alike]
    duplicates = {
        "images": len(training),
        "searched": len(indices),
        "look_like_another": sum(len(group) - 1 for group in groups),
        "examples": groups[:5],
    }

    def read(positions: Sequence[int]) -> Tensor:
        return next(sample_batches(training, [indices[i] for i in positions]))["image"]

    closest = nearest[list(nearest)[-1]]  # in features, where there are any
    pairs = closest_pairs(generated, closest["samples"], closest["held-out images"].distances, read)
    return nearest, duplicates, pairs


def write_nearest(subject: Subject, nearest: Mapping[str, Mapping[str, Nearest]], max_images: int, path: Path) -> None:
    """Write the nearest training image of each sample, by its name, and its distance in each space, as JSON."""
    source = subject.training.source
    indices = source.evenly_spaced(max_images)
    rows: list[dict[str, Any]] = [{"caption": caption} for caption in subject.captions]
    for space, sets in nearest.items():
        for row, distance, index in zip(rows, *(part.tolist() for part in sets["samples"]), strict=True):
            row[space] = {"image": source.names[indices[index]], "distance": float(f"{distance:.4g}")}
    write_text(path, json.dumps(rows, indent=1))


def spaces(subject: Subject) -> dict[str, Callable[[Tensor], Tensor]]:
    """Where images are near each other: in pixels, and in the latents and features that there are."""
    pipeline, extractor = subject.pipeline, subject.extractor
    found: dict[str, Callable[[Tensor], Tensor]] = {"pixels": lambda images: images.flatten(1)}
    if pipeline.vae is not None:
        found["latents"] = lambda images: torch.cat(
            [pipeline.encode(batch).flatten(1).float().cpu() for batch in images.split(64)]
        )
    if extractor is not None:
        found["features"] = lambda images: F.normalize(extract(extractor, images), dim=1)
    return found
