"""Windows: which values are shown from black to white."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ldm.medical.slices import Pixels, Values

# Centre and width in HU, as radiology uses them.
NAMED_WINDOWS = {"brain": (40, 80), "lung": (-600, 1500), "bone": (400, 1800), "soft-tissue": (50, 400)}
PERCENTILES = 0.5, 99.5  # of the values of a series


class Window(NamedTuple):
    """A window by its name, or by its centre and width."""

    name: str
    limits: tuple[float, float] | None = None  # the values that are black and white; None where a file or series says

    @property
    def in_hounsfield_units(self) -> bool:
        """Whether it is for CT alone."""
        return self.name in NAMED_WINDOWS

    def apply(self, pixels: Pixels, percentiles: Callable[[], tuple[float, float]]) -> Values:
        """Values in [0, 1], from black to white: inverted ones are turned last, and padding is black.

        ValueError: the window is to be the file's own, and it has none.
        """
        if self.name == "file":
            if pixels.own_window is None:
                raise ValueError("no window in this file: pass --data.window percentile, or C,W")
            shown = pixels.own_window()
        else:
            shown = scale(pixels.values, *(self.limits or percentiles()))
        shown = 1 - shown if pixels.inverted else shown
        return shown if pixels.padding is None else np.where(pixels.padding, np.float32(0), shown)


def parse_windows(text: str) -> list[Window]:
    """The windows in `brain+bone+40,80`, one for each channel. ValueError: no such window."""
    return [_parse(name.strip()) for name in text.split("+")]


def _parse(name: str) -> Window:
    if name in ("file", "percentile"):
        return Window(name)
    number = r"\s*(-?\d+\.?\d*)\s*"
    found = re.fullmatch(f"{number},{number}", name)
    center, width = map(float, found.groups()) if found else NAMED_WINDOWS.get(name, (0, 0))
    if not width > 0:
        known = ", ".join([*NAMED_WINDOWS, "file", "percentile"])
        raise ValueError(f"data.window {name!r}: no such window; choose {known}, or centre and width as in 40,80")
    return Window(name, (center - width / 2, center + width / 2))


def scale(values: Values, low: float, high: float) -> Values:
    """Values from `low` to `high` as 0 to 1, those beyond clipped; 0 where there is nothing between."""
    return ((values - np.float32(low)) / np.float32(max(high - low, 1e-12))).clip(0, 1).astype(np.float32)
