"""What an evaluation found: as a table, JSON, Markdown and a plot, and the comparison of two reports."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config import changed_values
from ldm.evaluation.estimates import Estimate
from ldm.evaluation.memorization import Memorization, Nearest
from ldm.io.atomic import atomic_write, write_text
from ldm.io.model_dir import read_json

FILE = "evaluation.json"
COVERED = re.compile(r"r?(precision|recall|density|coverage)_|prompt accuracy")  # measures from 0 to about 1


@dataclass
class Report:
    """Measures, and what they depend on."""

    model: dict[str, str]  # its folder and the hash of its U-Net
    protocol: dict[str, Any]  # in which reports must agree that are compared: data, counts, extractor, resize rule
    settings: dict[str, Any]  # in which they may differ: sampler, steps, guidance, seed
    measures: dict[str, Estimate] = field(default_factory=dict)
    memorization: dict[str, Memorization] = field(default_factory=dict)  # by the space of the distances
    training: dict[str, Any] = field(default_factory=dict)  # of the training images: how many, and duplicates
    notes: list[str] = field(default_factory=list)  # what was left out, and why
    figures: list[str] = field(default_factory=list)  # files beside the report

    def write(self, folder: Path) -> None:
        """Write evaluation.json and evaluation.md."""
        values = {"model": self.model, "protocol": self.protocol, "settings": self.settings}
        values |= {"measures": {name: e._asdict() for name, e in self.measures.items()}}
        values |= {"memorization": {space: found.to_dict() for space, found in self.memorization.items()}}
        write_text(folder / FILE, json.dumps({**values, "training": self.training, "notes": self.notes}, indent=2))
        write_text(folder / "evaluation.md", self.to_markdown())

    def table(self) -> str:
        """One line for each measure, with its 95 % confidence interval, and for each space of memorization."""
        width = max(map(len, self.measures), default=0)
        lines = [
            f"{name:{width}}  {e.value:8.3f}  [{e.low:.3f}, {e.high:.3f}]  n = {e.samples}"
            for name, e in self.measures.items()
        ]
        return "\n".join(lines + self.findings())

    def findings(self) -> list[str]:
        """Memorization and duplicates, a sentence each."""
        lines = [describe(space, found) for space, found in self.memorization.items()]
        if self.training:
            lines.append(
                "{look_like_another:,} of {searched:,} training images look like another one".format(**self.training)
            )
        return lines

    def to_markdown(self) -> str:
        """The report as a page."""
        rows = [
            [name, f"{e.value:.4g}", f"{e.low:.4g} to {e.high:.4g}", e.samples] for name, e in self.measures.items()
        ]
        facts = [[name, value] for name, value in {**self.model, **self.protocol, **self.settings}.items()]
        parts = ["# Evaluation"]
        if rows:
            parts.append(markdown_table(["measure", "value", "95 % interval", "samples"], rows))
        if self.memorization:
            parts += ["## Memorization", *self.findings()]
        parts += [f"![{file.removesuffix('.png')}]({file})" for file in self.figures]
        parts += ["## Settings", markdown_table(["setting", "value"], facts), *self.notes]
        return "\n\n".join(parts) + "\n"


def describe(space: str, found: Memorization) -> str:
    """Memorization in one space, in a sentence."""
    parts = [
        f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}] of samples are nearer than the nearest {percent} % of "
        f"held-out images (p = {p_value:.2g})"
        for percent, (share, p_value) in found.nearer.items()
    ]
    parts.append(f"a sample is nearer than a held-out image with probability {found.auc:.2f} (p = {found.p_value:.2g})")
    return f"to training images, in {space}: {'; '.join(parts)}" + ": training images are repeated" * found.is_evident


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in [head, ["---"] * len(head), *rows])


# Plots.


def plot(measures: Mapping[str, Estimate], nearest: Mapping[str, Mapping[str, Nearest]], path: Path) -> bool:
    """Draw the measures between 0 and 1 with intervals, and how near training images are; False: neither is there."""
    from matplotlib.figure import Figure

    bars = {name: e for name, e in measures.items() if COVERED.match(name)}
    count = bool(bars) + len(nearest)
    if not count:
        return False
    figure = Figure(figsize=(4 * count, 3.2))
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    if bars:
        _bars(axes.pop(0), bars)
    for axis, (space, sets) in zip(axes, nearest.items(), strict=True):
        for name, found in sets.items():
            axis.ecdf(found.distances.tolist(), label=name)
        axis.set_title(f"nearest training image, in {space}", fontsize=9)
        axis.set_xlabel("distance")
        axis.set_ylabel("share of images")
        axis.legend()
    figure.tight_layout()
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, dpi=110, format="png")
    return True


def _bars(axis: Any, bars: Mapping[str, Estimate]) -> None:
    """Values from 0 to 1 with their intervals, the first on top."""
    names, values = list(bars)[::-1], list(bars.values())[::-1]
    below = [[e.value - e.low for e in values], [e.high - e.value for e in values]]
    axis.barh(names, [e.value for e in values], xerr=below, color="C0", ecolor="black", capsize=2)
    axis.tick_params(labelsize=7)
    axis.set_xlim(0, max(1.0, *(e.high for e in values)))


# Comparing.


def compare(one: Path, other: Path) -> str:
    """A table of the measures of two reports and their differences. ValueError: they cannot be compared."""
    a, b = read_report(one), read_report(other)
    check_comparable(a, b, one, other)
    names = [name for name in a["measures"] if name in b["measures"]]
    rows = [_difference(name, Estimate(**a["measures"][name]), Estimate(**b["measures"][name])) for name in names]
    changed = {**changed_values(a["model"], b["model"]), **changed_values(a["settings"], b["settings"])}
    title = "; ".join(f"{key}: {before} -> {now}" for key, (before, now) in changed.items())
    table = markdown_table(["measure", "A", "B", "B - A", "95 % interval", ""], rows)
    missing = sorted(a["measures"].keys() ^ b["measures"].keys())
    return "\n\n".join([title, table] + [f"in one report alone: {', '.join(missing)}"] * bool(missing))


def _difference(name: str, a: Estimate, b: Estimate) -> list[str]:
    """A row; the interval is that of independent values, and a star says that it leaves 0 out."""
    low, high = math.hypot(b.value - b.low, a.high - a.value), math.hypot(b.high - b.value, a.value - a.low)
    change = b.value - a.value
    star = "" if change - low <= 0 <= change + high else "*"
    interval = f"{change - low:+.4g} to {change + high:+.4g}"
    return [name, f"{a.value:.4g}", f"{b.value:.4g}", f"{change:+.4g}", interval, star]


def read_report(path: Path) -> dict[str, Any]:
    """An evaluation.json, or that in a folder. ValueError: there is none, or an older ldm wrote it."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"--compare {path}: no such report: pass two {FILE}, or the folders that they are in")
    values = read_json(file)
    if "protocol" not in values:
        raise ValueError(f"--compare {file} does not say how it was measured: evaluate the model again")
    return values


def check_comparable(a: dict[str, Any], b: dict[str, Any], one: Path, other: Path) -> None:
    """ValueError names what the measures of two reports depend on, and in which they differ."""
    keys = [key for key in {**a["protocol"], **b["protocol"]} if a["protocol"].get(key) != b["protocol"].get(key)]
    if keys:
        listed = "; ".join(f"{key} is {a['protocol'].get(key)} and {b['protocol'].get(key)}" for key in keys)
        raise ValueError(f"{one} and {other} are not comparable: {listed}: evaluate both in the same way")
