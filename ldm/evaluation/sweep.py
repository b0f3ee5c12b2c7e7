"""A sweep over guidance scales, steps and samplers, drawn as heat maps: where a model is at its best."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ldm.evaluation.estimates import Estimate
from ldm.evaluation.features import CHOICES, extract
from ldm.evaluation.metrics import FD, compare_features, missing_metrics
from ldm.evaluation.prompts import asked_for
from ldm.evaluation.quality import clip_score, reference_features
from ldm.evaluation.subject import EvaluateConfig, Subject, generate
from ldm.io.atomic import atomic_write, write_text


class SweepPoint(NamedTuple):
    """What was measured with one combination of settings."""

    sampler: str
    steps: int
    guidance_scale: float
    estimate: Estimate


def write_sweep(measure: str, points: Sequence[SweepPoint], folder: Path, about: Mapping[str, Any]) -> None:
    """Write sweep.json, with what it is `about`, and sweep.png."""
    rows = [{**point._asdict(), "estimate": point.estimate._asdict()} for point in points]
    write_text(folder / "sweep.json", json.dumps({**about, "measure": measure, "points": rows}, indent=2))
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


def sweep(subject: Subject, config: EvaluateConfig, out: Path, about: Mapping[str, Any]) -> None:
    """Measure every combination of guidance scale, steps and sampler, and draw it; `about` says of what."""
    name, value = sweep_measure(subject, config)
    points = []
    combinations = list(product(config.sweep_samplers, config.sweep_steps, config.sweep_scales))
    for sampler, steps, scale in tqdm(combinations, "sweep", unit="combination"):
        settings = {"sampler": sampler, "steps": steps, "guidance_scale": scale}
        points.append(SweepPoint(sampler, steps, scale, value(config.model_copy(update=settings))))
    write_sweep(name, points, out, about)
    print(f"{name}: {out / 'sweep.png'}, {out / 'sweep.json'}")


def sweep_measure(subject: Subject, config: EvaluateConfig) -> tuple[str, Callable[[EvaluateConfig], Estimate]]:
    """What a sweep measures: prompt accuracy where there is a classifier, else the CLIP score, else the FD."""
    captions = subject.captions
    if subject.drawn:
        name = "prompt accuracy, all"
        return name, lambda chosen: asked_for(subject, generate(subject, captions, chosen))[name]
    extractor = subject.extractor
    if extractor is None:
        raise ValueError(f"--sweep needs --extractor, as the model has no image tower: {CHOICES}")
    if extractor.encode_text and any(subject.captions):
        return f"clip_score_{extractor.suffix}", lambda chosen: clip_score(
            extractor, extract(extractor, generate(subject, captions, chosen)), subject.captions
        )
    reference, name = reference_features(subject, extractor, config), f"fd_{extractor.suffix}"
    if missing := missing_metrics(reference, subject.images).get(FD):
        raise ValueError(f"--sweep: {missing}: raise --num-samples or add held-out images")
    return name, lambda chosen: compare_features(
        reference, extract(extractor, generate(subject, captions, chosen)), name=f"{{}}_{extractor.suffix}"
    )[name]
