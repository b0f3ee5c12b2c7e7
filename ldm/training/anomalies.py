"""Numbers that go wrong: non-finite gradients and loss spikes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOSS_WINDOW, MIN_LOSSES, SPIKE_STDS = 200, 100, 8.0


class Anomalies(NamedTuple):
    """What was collected over some steps."""

    skipped: list[int]  # steps
    spikes: dict[int, float]  # step -> loss
    nonfinite_run: tuple[int, int] | None  # first and last of consecutive skipped steps, where there were too many


class AnomalyMonitor:
    """Losses and gradient norms of the steps since they were last collected, on the device: no step waits for them.

    A step whose gradient is not finite is skipped: the norm is that of the whole batch, so all ranks agree. A loss is a
    spike where it lies 8 deviations above the mean of about the last 200 steps, once there were 100.
    """

    def __init__(self, *, limit: int) -> None:
        self.limit = limit  # consecutive steps that may be skipped
        self.skipped: list[int] = []  # steps since the start of the run
        self._run = 0  # consecutive skipped steps, up to the last one
        self._count, self._mean, self._variance = 0, 0.0, 0.0
        self._recorded: list[tuple[int, Tensor, Tensor]] = []

    def record(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Record a step (from 1); returns 1.0 where it must be skipped, else 0.0: an optimizer's `found_inf`."""
        nonfinite = ~torch.isfinite(norm)
        self._recorded.append((step, loss, nonfinite))
        return nonfinite.float()

    def collect(self, mean: Callable[[Tensor], Tensor]) -> Anomalies:
        """What went wrong in the recorded steps; `mean` averages a tensor over all ranks."""
        anomalies = Anomalies([], {}, None)
        if not self._recorded:
            return anomalies
        steps, losses, nonfinite = zip(*self._recorded, strict=True)
        self._recorded = []
        values = mean(torch.stack([loss.float() for loss in losses])).tolist()
        for step, loss, is_nonfinite in zip(steps, values, torch.stack(nonfinite).tolist(), strict=True):
            self._run = self._run + 1 if is_nonfinite else 0
            if is_nonfinite:
                anomalies.skipped.append(step)
                if self._run > self.limit:
                    anomalies = anomalies._replace(nonfinite_run=(step - self._run + 1, step))
            elif self._is_spike(loss):
                anomalies.spikes[step] = loss
        self.skipped += anomalies.skipped
        return anomalies

    def _is_spike(self, loss: float) -> bool:
        """Whether a loss is a spike; updates the running mean with the loss, clipped at the spike threshold."""
        threshold = self._mean + SPIKE_STDS * math.sqrt(self._variance)
        is_spike = self._count >= MIN_LOSSES and loss > threshold
        self._count += 1
        weight = 1 / min(self._count, LOSS_WINDOW)
        deviation = (min(loss, threshold) if is_spike else loss) - self._mean
        self._mean += weight * deviation
        self._variance = (1 - weight) * (self._variance + weight * deviation**2)
        return is_spike
