"""How far generated images are from real ones, by the features of both: FD, KID, CMMD, and what each set covers."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.evaluation.estimates import Estimate, bootstrap_ci, bootstrap_counts, proportion_ci
from ldm.evaluation.frechet import weighted_frechet_distance

Kernel = Callable[[Tensor, Tensor], Tensor]  # features (n, d) and (m, d) -> (n, m)
PRECISION_K, DENSITY_K = 3, 5  # neighbours, as in Kynkäänniemi et al. 2019 and in Naeem et al. 2020
BLOCK = 1024  # rows of a matrix of distances that are in memory at a time
CMMD_SCALE = 1000
MMD_IMAGES = 10  # of fewer, a resample may hold one image alone, which has no pair
FD, MMD, NEIGHBOURS = "fd", "kid and cmmd", "precision, recall, density and coverage"  # what needs how many images


def compare_features(real: Tensor, other: Tensor, *, name: str, paired: bool = False) -> dict[str, Estimate]:
    """Every metric of features (n, d) and (m, d) that has enough images; `name` is a format such as "{}_self".

    Those that are `paired` belong together row by row, as an image and its reconstruction or its caption's: they are
    resampled together, and kernel distances leave each pair out. `missing_metrics` names those without enough images.
    """
    missing, count = missing_metrics(real, other), len(other)
    weights_real = bootstrap_counts(len(real), "real")
    weights = weights_real if paired else bootstrap_counts(count, "other")
    found: dict[str, Estimate] = {}
    if FD not in missing:
        rows = tqdm(
            zip(weights_real, weights, strict=True), name.format(FD), len(weights), leave=False, unit="resample"
        )
        distances = [weighted_frechet_distance(real, other, *pair) for pair in rows]
        found["fd"] = bootstrap_ci(torch.tensor(distances, dtype=torch.float64), count, least=0)
    if MMD not in missing:
        unit = F.normalize(real, dim=1), F.normalize(other, dim=1)
        kid = squared_mmd(real, other, polynomial_kernel, weights_real, weights, paired=paired)
        cmmd = CMMD_SCALE * squared_mmd(*unit, gaussian_kernel, weights_real, weights, paired=paired)
        found |= {"kid": bootstrap_ci(kid, count), "cmmd": bootstrap_ci(cmmd, count)}
    if NEIGHBOURS not in missing:
        found |= covered(real, other, weights)
    return {name.format(metric): estimate for metric, estimate in found.items()}


def missing_metrics(real: Tensor, other: Tensor) -> dict[str, str]:
    """What each metric needs more images for than there are."""
    count, width = min(len(real), len(other)), real.shape[1]
    needed = {
        FD: (width + 1, f", one more than the {width} dimensions of its features"),
        MMD: (MMD_IMAGES, " for the resamples of its interval"),
        NEIGHBOURS: (DENSITY_K + 1, ""),
    }
    return {
        name: f"{name}: at least {least:,} images of each set are needed{reason}; there are {count:,}"
        for name, (least, reason) in needed.items()
        if count < least
    }


# Kernel distances.


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x y / d + 1)^3, of KID: Bińkowski et al. 2018."""
    return (x @ y.mT / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 10^2)), of CMMD: Jayasumana et al. 2024, for features of length 1."""
    return (-torch.cdist(x, y).square() / (2 * 10**2)).exp()


def squared_mmd(
    a: Tensor, b: Tensor, kernel: Kernel, weights_a: Tensor, weights_b: Tensor, *, paired: bool = False
) -> Tensor:
    """Squared maximum mean discrepancy of features (n, d) and (m, d) for each row of weights (k, n), (k, m): (k,).

    The estimates without bias of Gretton et al. 2012 (equation 3; equation 4 for `paired` rows): 0 on average for
    samples of one distribution. No sample is compared with itself, also where a bootstrap draws it twice.
    """
    a, b = a.double(), b.double()
    if paired:
        cross = _off_diagonal(a, b, kernel, weights_a)
    else:
        cross = _pair_sum(a, b, kernel, weights_a, weights_b) / (weights_a.sum(1) * weights_b.sum(1))
    return _off_diagonal(a, a, kernel, weights_a) + _off_diagonal(b, b, kernel, weights_b) - 2 * cross


def _off_diagonal(x: Tensor, y: Tensor, kernel: Kernel, weights: Tensor) -> Tensor:
    """The mean of the kernel over pairs of different rows, (k,)."""
    both = zip(x.split(BLOCK), y.split(BLOCK), strict=True)
    diagonal = torch.cat([kernel(rows, others).diagonal() for rows, others in both])
    squares = weights.square()
    return (_pair_sum(x, y, kernel, weights, weights) - squares @ diagonal) / (weights.sum(1) ** 2 - squares.sum(1))


def _pair_sum(x: Tensor, y: Tensor, kernel: Kernel, weights_x: Tensor, weights_y: Tensor) -> Tensor:
    """The sum of weight x weight x kernel over all pairs, (k,)."""
    blocks = zip(x.split(BLOCK), weights_x.split(BLOCK, dim=1), strict=True)
    return torch.stack([(w * (weights_y @ kernel(y, rows))).sum(1) for rows, w in blocks]).sum(0)


# Neighbours.


def covered(real: Tensor, other: Tensor, weights: Tensor) -> dict[str, Estimate]:
    """Precision, recall, density and coverage of features (n, d) and (m, d); weights (k, m) are those of a bootstrap.

    A sample's ball reaches to its k-th neighbour in its own set. Precision is the share of images that are in the ball
    of a real one, recall the other way round (Kynkäänniemi et al. 2019). Density is in how many real balls an image is,
    by k, and coverage the share of real balls that hold an image (Naeem et al. 2020). Intervals take balls as given;
    those of shares are Wilson's, which are right for 0 and 1, too.
    """
    narrow, wide = neighbour_radii(real, PRECISION_K), neighbour_radii(real, DENSITY_K)
    own = neighbour_radii(other, PRECISION_K)
    precise, density, recalled, filled = torch.zeros(len(other), dtype=torch.bool), torch.zeros(len(other)), 0, 0
    for rows, distances in _distance_blocks(real, other):
        precise |= (distances <= narrow[rows, None]).any(0)
        inside = distances <= wide[rows, None]
        density += inside.sum(0) / DENSITY_K
        filled += int(inside.any(1).sum())
        recalled += int((distances <= own).any(1).sum())
    return {
        "precision": proportion_ci(int(precise.sum()), len(other)),
        "recall": proportion_ci(recalled, len(real)),
        "density": bootstrap_ci(weights @ density.double() / len(other), len(other), least=0),
        "coverage": proportion_ci(filled, len(real)),
    }


def neighbour_radii(x: Tensor, k: int) -> Tensor:
    """The distance of each of the features (n, d) to its k-th neighbour among the others, (n,)."""
    return torch.cat([distances.topk(k + 1, largest=False).values[:, k] for _, distances in _distance_blocks(x, x)])


def _distance_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of x at a time, and their distances to all of y."""
    for first in range(0, len(x), BLOCK):
        rows = slice(first, min(first + BLOCK, len(x)))
        yield rows, torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")
