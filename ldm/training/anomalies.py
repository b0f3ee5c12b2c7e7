"""Numbers that go wrong: gradients that are not finite, and losses that jump."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOSS_WINDOW, MIN_LOSSES, SPIKE_STDS = 200, 100, 8.0


class Anomalies(NamedTuple):
    """What a look at some steps found."""

    skipped: list[int]  # steps
    spikes: dict[int, float]  # step -> loss
    nonfinite_run: (
        tuple[int, int] | None
    )  # first and last of the steps that were skipped in a row, where they were too many


class AnomalyMonitor:
    """The losses and gradient norms of the steps since the last look, on the device, so that no step waits for them.

    A step whose gradient is not finite is skipped: the norm is that of the whole batch, so all processes agree. A loss
    is a spike where it lies 8 deviations above the mean of the last 200 steps or so, once there were 100.
    """

    def __init__(self, *, limit: int, skipped: int = 0) -> None:
        self.limit = limit  # steps that may be skipped in a row
        self.skipped, self.row = skipped, 0  # steps since the start of the run, and the last of them in a row
        self.seen, self.mean, self.variance = 0, 0.0, 0.0
        self._kept: list[tuple[int, Tensor, Tensor]] = []

    def record(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Keep a step (from 1); returns 1.0 where it must be skipped, else 0.0: optimizers take it as `found_inf`."""
        bad = ~torch.isfinite(norm)
        self._kept.append((step, loss, bad))
        return bad.float()

    def collect(self, mean: Callable[[Tensor], Tensor]) -> Anomalies:
        """Look at the steps that were noted; `mean` averages a tensor over all processes."""
        if not self._kept:
            return Anomalies([], {}, None)
        steps, losses, bad = zip(*self._kept, strict=True)
        self._kept = []
        values = mean(torch.stack([loss.float() for loss in losses])).tolist()
        found = Anomalies([], {}, None)
        for step, loss, is_bad in zip(steps, values, torch.stack(bad).tolist(), strict=True):
            self.row = self.row + 1 if is_bad else 0
            if is_bad:
                found.skipped.append(step)
                if self.row > self.limit:
                    found = found._replace(nonfinite_run=(step - self.row + 1, step))
            elif self._is_spike(loss):
                found.spikes[step] = loss
        self.skipped += len(found.skipped)
        return found

    def _is_spike(self, loss: float) -> bool:
        """Whether a loss is a spike; takes it into the mean, but no further than a spike."""
        bound = self.mean + SPIKE_STDS * math.sqrt(self.variance)
        jumps = self.seen >= MIN_LOSSES and loss > bound
        self.seen += 1
        share = 1 / min(self.seen, LOSS_WINDOW)
        away = (min(loss, bound) if jumps else loss) - self.mean
        self.mean += share * away
        self.variance = (1 - share) * (self.variance + share * away**2)
        return jumps
