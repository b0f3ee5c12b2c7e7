"""A watchdog: goes back to the last good checkpoint when a held-out measure stays worse than it was."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ldm.config import Config

MAX_RETURNS = 5


class WatchdogConfig(Config):
    """When training has gone wrong."""

    drop: float = Field(2.0, gt=0)
    """how far held-out PSNR may fall below its best before it counts as worse, in dB"""
    patience: int = Field(3, ge=1)
    """validations in a row that are worse, after which training goes back"""


class Watchdog:
    """Follows one measure, of which more is better, and holds the factor by which a risky loss is weakened.

    What it remembers are plain numbers, which a checkpoint holds, so a resumed run decides as an uninterrupted one.
    """

    def __init__(self, config: WatchdogConfig, measure: str, *, start: int) -> None:
        self.config, self.measure, self.start = config, measure, start  # `start`: the step from which it may go back
        self.best: float | None = None
        self.seen_step = 0  # of the last validation
        self.good_step = 0  # of the last one that was not worse
        self.worse = 0  # validations since then
        self.returns = 0
        self.last = 0.0  # the measure at `seen_step`

    @property
    def factor(self) -> float:
        """1, halved with each return."""
        return 0.5**self.returns

    def observe(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether to go back, after a validation at `step`; one that was seen before changes nothing."""
        if step <= self.seen_step:
            return False
        self.seen_step, self.last = step, values[self.measure]
        best = self.last if self.best is None else self.best
        if self.best is None or self.last >= best - self.config.drop:  # NaN is worse
            self.best = max(best, self.last)
            self.good_step, self.worse = step, 0
        elif step > self.start:
            self.worse += 1
        return self.worse >= self.config.patience

    def go_back(self, step: int) -> None:
        """Weaken the loss and go on from the checkpoint of `step`; ValueError: it did so too often."""
        if self.returns == MAX_RETURNS:
            raise ValueError(f"{self.complaint()}, also with 1/{2**self.returns} of the weight: lower --learning-rate")
        self.seen_step = self.good_step = step
        self.worse, self.returns = 0, self.returns + 1

    def complaint(self) -> str:
        """What is wrong, with the numbers."""
        fell = f"{self.measure} fell from {self.best:.4g} to {self.last:.4g}"
        return f"{fell} and stayed low for {self.worse} validation{'s' * (self.worse > 1)}"

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        names = ("best", "seen_step", "good_step", "worse", "returns", "last")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)
