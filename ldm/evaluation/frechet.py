"""The Fréchet distance between two sets of features."""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Distance of two normal distributions with the moments of features (n, d) and (m, d).

    Source: Heusel et al. 2017, equation 6. ValueError: fewer than two rows, which have no covariance.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Fréchet distance needs two images of each set at least, not {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    covariance_a, covariance_b = a.T.cov(correction=1), b.T.cov(correction=1)
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    common = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    return (mean + covariance_a.trace() + covariance_b.trace() - 2 * common).clamp_min(0).item()
