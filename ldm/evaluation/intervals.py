"""Estimates with their uncertainty."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959964  # of the standard normal


class Estimate(NamedTuple):
    """A value with its 95 % confidence interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    samples: int


def proportion_ci(successes: int, count: int) -> Estimate:
    """Share of successes with Wilson's score interval (Wilson 1927)."""
    if count < 1:
        raise ValueError("a proportion needs at least one sample")
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
