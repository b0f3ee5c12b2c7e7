"""A sweep over guidance scales, steps and samplers, drawn as heat maps: where a model is at its best."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.evaluation.estimates import Estimate
from ldm.io.atomic import atomic_write, write_text


class SweepPoint(NamedTuple):
    """What was measured with one combination of settings."""

    sampler: str
    steps: int
    guidance_scale: float
    estimate: Estimate


def write_sweep(measure: str, points: Sequence[SweepPoint], folder: Path) -> None:
    """Write sweep.json and sweep.png."""
    rows = [{**point._asdict(), "estimate": point.estimate._asdict()} for point in points]
    write_text(folder / "sweep.json", json.dumps({"measure": measure, "points": rows}, indent=2))
    heat_map(measure, points, folder / "sweep.png")


def heat_map(measure: str, points: Sequence[SweepPoint], path: Path) -> None:
    """Write one map for each sampler: guidance scales to the right, steps upwards, the value in each cell."""
    from matplotlib.figure import Figure

    samplers = sorted({point.sampler for point in points})
    steps, scales = sorted({point.steps for point in points}), sorted({point.guidance_scale for point in points})
    values = [point.estimate.value for point in points]
    low, high = min(values), max(values)
    figure = Figure(figsize=(max(3.0, 0.9 * len(scales)) * len(samplers) + 1, 0.7 * len(steps) + 1.6))
    axes = figure.subplots(1, len(samplers), squeeze=False)[0]
    for axis, sampler in zip(axes, samplers, strict=True):
        cells = {(p.steps, p.guidance_scale): p.estimate.value for p in points if p.sampler == sampler}
        grid = [[cells[row, column] for column in scales] for row in steps]
        shown = axis.imshow(grid, vmin=low, vmax=high, origin="lower", aspect="auto")
        for (row, column), value in _enumerate(grid):
            shade = "black" if value > (low + high) / 2 else "white"
            axis.text(column, row, f"{value:.3g}", ha="center", va="center", color=shade, fontsize=8)
        axis.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
        axis.set_yticks(range(len(steps)), [str(count) for count in steps])
        axis.set_title(sampler)
        axis.set_xlabel("guidance scale")
        axis.set_ylabel("steps")
    figure.colorbar(shown, ax=list(axes), label=measure)
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, dpi=110, format="png", bbox_inches="tight")


def _enumerate(grid: Sequence[Sequence[float]]) -> list[tuple[tuple[int, int], Any]]:
    return [((row, column), value) for row, values in enumerate(grid) for column, value in enumerate(values)]
