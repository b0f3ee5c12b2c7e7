"""The Fréchet distance of two sets of features, each seen as a normal distribution."""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of features (n, d) and (m, d): |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)).

    A and B are their covariances. Sources: Dowson and Landau 1982; Heusel et al. 2017. ValueError: fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Fréchet distance needs at least two images of each set, not {len(a)} and {len(b)}")
    return weighted_frechet_distance(a, b, torch.ones(len(a)), torch.ones(len(b)))


def weighted_frechet_distance(a: Tensor, b: Tensor, weights_a: Tensor, weights_b: Tensor) -> float:
    """That of features of which each counts as often as its weight says, (n,) and (m,)."""
    (mean_a, root_a), (mean_b, root_b) = _mean_and_root(a, weights_a), _mean_and_root(b, weights_b)
    # The eigenvalues of A B are those of a symmetric matrix: real, and not negative.
    cross = root_a @ root_b.mT
    common = torch.linalg.eigvalsh(cross @ cross.mT).clamp_min(0).sqrt().sum()
    traces = root_a.square().sum() + root_b.square().sum()
    return max(0.0, float((mean_a - mean_b).square().sum() + traces - 2 * common))


def _mean_and_root(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (d,) of features (n, d), and a root (min(n, d), d) for which root.T @ root is their covariance."""
    x, weights = x.double(), weights.double().to(x.device)[:, None]
    mean = (weights * x).sum(0) / weights.sum()
    root = (weights / (weights.sum() - 1)).sqrt() * (x - mean)
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root
