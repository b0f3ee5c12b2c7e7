"""Measure ldm against diffusers, on the same weights, inputs and machine: docs/performance.md and its chart.

    python benchmarks/run.py --device cpu
    python benchmarks/run.py --device cuda

Each comparison checks first that all return the same, as a faster wrong answer is none. Then they take turns, after a
call that does not count. A ratio is theirs to ours, the median over the rounds. FLOP and memory are of the tensors that
one call makes; what the weights take is not in it.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from commit import commit
from comparisons import Comparison, encode_text, make_pair, prompt_to_image, unet_forward, vae_decode, vae_encode
from pydantic import Field
from torch import Tensor
from training_steps import bare_training_step, training_steps

from ldm.cli import ScriptConfig, command
from ldm.config import CONFIGS
from ldm.evaluation.machine import measure_machine, recipe_conv
from ldm.evaluation.report import markdown_table
from ldm.io.atomic import write_text
from ldm.planning.cost import FlopMemoryMeter
from ldm.planning.device import clock, format_bytes
from ldm.planning.planner import read_recipe
from ldm.precision import resolve_device

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/performance.md"
OURS = "ldm"


class RunConfig(ScriptConfig):
    """Settings of the suite."""

    device: Literal["cpu", "cuda"] = "cpu"
    recipes: tuple[Path, ...] = (CONFIGS / "exportable", CONFIGS / "characters", CONFIGS / "sd21-base")
    """folders of recipes whose networks are compared"""
    only: str = ""
    """the comparisons whose name has this in it"""
    seconds: float = Field(10.0, gt=0)
    """least time for each comparison"""
    rounds: int = Field(5, ge=1)
    """least number of rounds of each comparison"""


def comparisons(folder: Path, device: torch.device, stack: ExitStack) -> Iterator[Callable[[], Comparison]]:
    """What is compared on a device, as far as its speed allows."""
    config, on_gpu = read_recipe(folder / "ldm.yaml"), device.type == "cuda"
    if config.unet.patch_size > 1:  # which diffusers has no networks for
        yield lambda: stack.enter_context(bare_training_step(folder, device))
        return
    is_small = config.data.resolution < 256
    pair = stack.enter_context(make_pair(folder, device))
    for batch in (1, 32) if is_small else (1, 2, 8, 64) if on_gpu else (1, 2):
        yield partial(unet_forward, pair, batch)
    for side in (config.data.resolution,) if is_small else (256, 512, 1024) if on_gpu else (256, 512):
        yield partial(vae_encode, pair, side)
        yield partial(vae_decode, pair, side)
    yield partial(encode_text, pair, 1)
    yield partial(encode_text, pair, 8)
    if is_small or on_gpu:
        yield partial(prompt_to_image, pair)
        yield lambda: stack.enter_context(training_steps(pair, folder))


def measure(comparison: Comparison, seconds: float, rounds: int) -> dict[str, Any]:
    """Check that all return the same, and time them in turns. ValueError: they do not."""
    ways = {OURS: comparison.ours, **comparison.theirs}
    outputs = {name: action() for name, action in ways.items()}
    costs = {name: cost(action) for name, action in ways.items()}
    results: dict[str, Any] = {}
    if comparison.tolerance is not None:
        for name in comparison.theirs:
            error = difference(outputs[OURS], outputs[name])
            results.setdefault("difference", {})[name] = float(f"{error:.2g}")
            if not error <= comparison.tolerance:
                raise ValueError(f"{comparison.name}: {OURS} differs from {name} by {error:.2g}, which is too much")
    times = take_turns(ways, seconds, rounds)
    results["seconds"] = {name: float(f"{statistics.median(values):.4g}") for name, values in times.items()}
    results["ratio"] = {
        name: round(statistics.median(b / a for a, b in zip(times[OURS], times[name], strict=True)), 3)
        for name in comparison.theirs
    }
    results["gflop"] = {name: round(meter.flop / 1e9, 2) for name, meter in costs.items()}
    results["memory"] = {name: meter.peak_bytes for name, meter in costs.items()}
    return results


def difference(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference, over that of the other."""
    return ((one.float() - other.float()).square().mean() / other.float().square().mean()).sqrt().item()


def cost(action: Callable[[], object]) -> FlopMemoryMeter:
    """FLOP and memory of one call."""
    with FlopMemoryMeter() as meter:
        action()
    return meter


def take_turns(ways: Mapping[str, Callable[[], object]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; as many rounds as these seconds have, or more."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = clock() + seconds
    while len(times[OURS]) < rounds or clock() < end:
        for name, action in ways.items():
            begin = clock()
            action()
            times[name].append(clock() - begin)
    return times


# The report.


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Bars: how many times longer the others take."""
    bars = [
        (f"{recipe}: {name}\nagainst {who}", who, ratio)
        for recipe, found in results.items()
        for name, values in found.items()
        for who, ratio in values["ratio"].items()
    ]
    labels, others, ratios = zip(*bars, strict=True)
    colors = {who: f"C{index}" for index, who in enumerate(dict.fromkeys(others))}
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(bars) + 1), layout="constrained")
    drawn = axes.barh(labels, ratios, color=[colors[who] for who in others])
    axes.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params("y", labelsize=7)
    axes.set_xlim(0, 1.15 * max(ratios))
    axes.set_xlabel(f"seconds, over those of {OURS}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """A line for each comparison and each of the others."""
    for recipe, found in results.items():
        for name, values in found.items():
            for who, ratio in values["ratio"].items():
                ms = [f"{1000 * values['seconds'][way]:,.1f}" for way in (OURS, who)]
                memory = [format_bytes(values["memory"][way]) for way in (OURS, who)]
                yield [recipe, name, who, f"{ratio:.2f}", *ms, *memory]


def run(config: RunConfig) -> None:
    """Measure, and write the results, the chart and the table."""
    diffusers.utils.logging.disable_progress_bar()
    device = resolve_device(config.device)
    machine = {**measure_machine(recipe_conv(CONFIGS / "characters"))._asdict(), "diffusers": diffusers.__version__}
    results: dict[str, Any] = {}
    for folder in config.recipes:
        with ExitStack() as stack:
            for make in comparisons(folder, device, stack):
                comparison = make()
                if config.only in comparison.name:
                    found = measure(comparison, config.seconds, config.rounds)
                    results.setdefault(folder.name, {})[comparison.name] = found
                    print(f"{folder.name}, {comparison.name}: {json.dumps(found)}", flush=True)
    result = {**machine, "commit": commit(), "comparisons": results}
    write_text(ROOT / f"benchmarks/results/performance-{device.type}.json", json.dumps(result, indent=1) + "\n")
    draw(results, ROOT / f"docs/images/performance-{device.type}.png")
    header = ["recipe", "what", "baseline", "ratio", f"{OURS}, ms", "theirs, ms", f"{OURS}, memory", "theirs, memory"]
    before, rest = DOCUMENT.read_text().split(f"<!-- {device.type} -->\n")
    after = rest.split("<!-- end -->\n", 1)[1]
    table = markdown_table(header, list(rows(results)))
    write_text(DOCUMENT, f"{before}<!-- {device.type} -->\n\n{table}\n\n<!-- end -->\n{after}")
    print(table)


main = command(RunConfig, run, __doc__)

if __name__ == "__main__":
    main()
