"""Values with 95 % confidence intervals: of shares, of means, and by the bootstrap of anything else."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm import rng

Z95 = 1.959964  # of the standard normal
RESAMPLES = 200  # of a bootstrap


class Estimate(NamedTuple):
    """A value with its 95 % confidence interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    samples: int


def proportion_ci(successes: int, count: int) -> Estimate:
    """Share of successes with Wilson's score interval (Wilson 1927)."""
    share, z2 = successes / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Estimate(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)), count)


def mean_ci(values: Sequence[float]) -> Estimate:
    """Mean with its normal interval; the values are independent samples."""
    count = len(values)
    if count < 2:
        raise ValueError(f"a confidence interval needs at least two samples, not {count}")
    average = sum(values) / count
    deviation = math.sqrt(sum((v - average) ** 2 for v in values) / (count - 1))
    half = Z95 * deviation / math.sqrt(count)
    return Estimate(average, average - half, average + half, count)


def bootstrap_counts(count: int, stream: str) -> Tensor:
    """How often each of `count` samples is drawn: (1 + RESAMPLES, count) float64; the first row is the samples once.

    Source: Efron 1979. A statistic of weighted samples gives its value and its replicates from these rows.
    """
    draws = torch.randint(count, (RESAMPLES, count), generator=rng.generator("bootstrap", stream))
    counts = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    counts.scatter_add_(1, draws, torch.ones((), dtype=torch.float64).expand_as(draws))
    return torch.cat([torch.ones(1, count, dtype=torch.float64), counts])


def bootstrap_ci(values: Tensor, samples: int, *, least: float = -math.inf) -> Estimate:
    """The estimate of a statistic (1 + RESAMPLES,): its value, and then its replicates; it is `least` or more.

    The interval is the spread of the replicates about their mean. A distance of distributions is larger for resampled
    images, which are fewer different ones; so the percentiles themselves would lie above the value.
    """
    value, replicates = float(values[0]), values[1:]
    low, high = (replicates - replicates.mean()).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Estimate(value, max(least, value + min(low, 0.0)), value + max(high, 0.0), samples)
