"""Measure ldm against diffusers, on the same weights, inputs and machine: docs/performance.md and its chart.

    python benchmarks/run.py --device cpu
    python benchmarks/run.py --device cuda

Each comparison checks first that all return the same, as a faster wrong answer is none. Then they take turns, after a
call that does not count. A ratio is theirs to ours, the median over the rounds. FLOP and memory are of the tensors that
one call makes; what the weights take is not in it.
"""

import ldm  # noqa: F401  # isort: skip  (before torch: it sets how threads wait)

import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import diffusers
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch._dynamo
from commit import commit
from comparisons import (
    COMPILED,
    SAMPLING_STEPS,
    Comparison,
    Pair,
    encode_text,
    first_image,
    first_step,
    help_text,
    make_pair,
    prompt_to_image,
    unet_forward,
    vae_decode,
    vae_encode,
)
from document import ROOT, write_table
from pydantic import Field
from training_steps import bare_training_step, narrow_training_steps, step_config, step_name, training_steps

from ldm.cli import ScriptConfig, command
from ldm.config import CONFIGS
from ldm.evaluation.machine import measure_machine, recipe_conv
from ldm.io.atomic import write_text
from ldm.planning.cost import FlopMemoryMeter
from ldm.planning.device import clock, format_bytes
from ldm.planning.planner import read_recipe
from ldm.precision import Precision, resolve_device
from ldm.stages.diffusion import TrainLDMConfig


class RunConfig(ScriptConfig):
    """Settings of the suite."""

    device: Literal["cpu", "cuda"] = "cpu"
    recipes: tuple[Path, ...] = (CONFIGS / "exportable", CONFIGS / "characters", CONFIGS / "sd21-base")
    """folders of recipes whose networks are compared"""
    compile: bool | None = None
    """also compile the networks; on GPUs when left out"""
    only: str = ""
    """the comparisons whose name has this in it; others keep the results that they have"""
    seconds: float = Field(10.0, gt=0)
    """least time for each comparison"""
    rounds: int = Field(5, ge=1)
    """least number of rounds of each comparison"""

    @property
    def compiled(self) -> bool:
        """Whether networks are also compiled."""
        return self.device == "cuda" if self.compile is None else self.compile


Make = Callable[[ExitStack, ExitStack], Comparison]  # what is open for the recipe, and for this comparison


def comparisons(folder: Path, config: RunConfig) -> Iterator[tuple[str, Make]]:
    """What is compared of a recipe, as far as the speed of the device allows: names, and what makes each."""
    device, on_gpu, step = torch.device(config.device), config.device == "cuda", step_config(folder)
    if step.unet.patch_size > 1:  # which diffusers has no networks for
        yield step_name(step), lambda of_recipe, own: own.enter_context(bare_training_step(folder, device))
        return
    is_small, pairs = step.data.resolution < 256, list[Pair]()

    def pair(of_recipe: ExitStack) -> Pair:
        """Made once, for the first comparison that is measured."""
        if not pairs:
            precision: Precision = "bf16" if on_gpu else "float32"
            made = make_pair(folder, device, precision=precision, compiled=config.compiled)
            pairs.append(of_recipe.enter_context(made))
        return pairs[0]

    def of_pair(make: Callable[..., Comparison], *values: int) -> Make:
        return lambda of_recipe, own: make(pair(of_recipe), *values)

    def of_weights(step: TrainLDMConfig) -> Make:
        return lambda of_recipe, own: own.enter_context(
            training_steps(pair(of_recipe).folder, step, device, compiled=config.compiled)
        )

    if not is_small and not on_gpu:  # first, while there is memory for it
        half = step.unet.model_channels // 2
        narrow = step_config(
            folder, model_channels=half, resolution=256, batch_size=4, cache_latents=True, num_workers=0
        )
        name = f"{step_name(narrow)}, half as wide"
        yield name, lambda of_recipe, own: own.enter_context(narrow_training_steps(folder, narrow, device))
    cells = step.data.resolution // read_recipe(folder / "vae.yaml").vae.factor
    for batch in (1, 32) if is_small else (1, 2, 8, 64) if on_gpu else (1, 2):
        yield f"U-Net, {cells} x {cells}, batch {batch}", of_pair(unet_forward, batch)
    for side in (step.data.resolution,) if is_small else (256, 512, 1024) if on_gpu else (256, 512):
        yield f"VAE, encode {side} x {side}", of_pair(vae_encode, side)
        yield f"VAE, decode {side} x {side}", of_pair(vae_decode, side)
    for batch in (1, 8):
        yield f"Text tower, batch {batch}", of_pair(encode_text, batch)
    if is_small or on_gpu:
        yield f"Prompt to image, DDIM, {SAMPLING_STEPS} steps, guidance", of_pair(prompt_to_image)
    if is_small:
        yield step_name(step), of_weights(step)
        if not on_gpu:
            yield "Process to the first image, 1 step", of_pair(first_image)
    elif on_gpu:
        for side, batch in ((256, 64), (512, 16)):
            for cached in (True, False):
                values = {"resolution": side, "batch_size": batch, "cache_latents": cached, "num_workers": 8}
                larger = step_config(folder, **values)
                yield step_name(larger), of_weights(larger)


def starts(config: RunConfig) -> Iterator[tuple[str, Make]]:
    """How long scripts take to answer, or to the first step, on a CPU."""

    def of_script(script: str) -> Make:
        return lambda of_recipe, own: help_text(script)

    if config.device == "cpu":
        for script in ("txt2img.py", "train_ldm.py", "evaluate.py"):
            yield f"{script} --help", of_script(script)
        yield "train_vae.py to the first step", lambda of_recipe, own: first_step()


def measure(comparison: Comparison, device: torch.device, seconds: float, rounds: int) -> dict[str, Any]:
    """Check that all return the same, and time them in turns. ValueError: they do not."""
    ours, *others = comparison.ways
    outputs = {way: action() for way, action in comparison.ways.items()}
    results: dict[str, Any] = {}
    for way in others:
        if comparison.tolerance is None:
            break
        error = comparison.difference(outputs[ours], outputs[way])
        results.setdefault("difference", {})[way] = float(f"{error:.2g}")
        if not error <= comparison.tolerance:
            raise ValueError(f"{ours} differs from {way} by {error:.2g}, which is too much")
    results |= costs(comparison, device)
    times = take_turns(comparison.ways, seconds, rounds)
    results["seconds"] = {way: float(f"{statistics.median(values):.4g}") for way, values in times.items()}
    results["ratio"] = {
        way: round(statistics.median(b / a for a, b in zip(times[ours], times[way], strict=True)), 3) for way in others
    }
    return results


def costs(comparison: Comparison, device: torch.device) -> dict[str, dict[str, float]]:
    """Bytes of the tensors that a call of each way makes, at their peak, and on a CPU FLOP; where they can be seen."""
    found: dict[str, dict[str, float]] = {"memory": {}}
    for way, action in comparison.ways.items() if not comparison.in_processes else ():
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            action()
            found["memory"][way] = torch.cuda.max_memory_allocated() - before
        elif not way.endswith(COMPILED):
            with FlopMemoryMeter() as meter:
                action()
            found["memory"][way] = meter.peak_bytes
            found.setdefault("gflop", {})[way] = round(meter.flop / 1e9, 2)
    return found


def take_turns(ways: Mapping[str, Callable[[], object]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, each round begins with another; as many as these seconds have, or more."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    order, end, done = list(ways), clock() + seconds, 0
    while done < rounds or clock() < end:
        for way in order:
            begin = clock()
            ways[way]()
            times[way].append(clock() - begin)
        order, done = [*order[1:], order[0]], done + 1
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
    axes.set_xlabel("seconds, over ours")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """A line for each comparison and each of the others."""
    for recipe, found in results.items():
        for name, values in found.items():
            ours = next(iter(values["seconds"]))
            for who, ratio in values["ratio"].items():
                ms = [f"{1000 * values['seconds'][way]:,.1f}" for way in (ours, who)]
                memory = [format_bytes(values["memory"][way]) if way in values["memory"] else "" for way in (ours, who)]
                yield [recipe, name, ours, who, f"{ratio:.2f}", *ms, *memory]


def run(config: RunConfig) -> None:
    """Measure, keep each result as it comes, write chart and table. ValueError: what could not be measured."""
    diffusers.utils.logging.disable_progress_bar()
    device = resolve_device(config.device)
    if device.type == "cuda":
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")  # of training steps
    else:
        os.environ["ACCELERATE_USE_CPU"] = "1"
    file = ROOT / f"benchmarks/results/performance-{device.type}.json"
    found, failed, count = open_results(file, device), list[str](), 0
    recipes = {folder.name: comparisons(folder, config) for folder in config.recipes}
    for recipe, made in {"scripts": starts(config), **recipes}.items():
        with ExitStack() as of_recipe:
            for name, make in made:
                if config.only not in name:
                    continue
                torch._dynamo.reset()
                count += 1
                try:
                    with ExitStack() as own:
                        values = measure(make(of_recipe, own), device, config.seconds, config.rounds)
                except (ValueError, RuntimeError) as error:
                    failed.append(f"{recipe}, {name}: {error}")
                    print(failed[-1], flush=True)
                    continue
                found["comparisons"].setdefault(recipe, {})[name] = {**values, "commit": commit()}
                write_text(file, json.dumps(found, indent=1) + "\n")
                print(f"{recipe}, {name}: {json.dumps(values)}", flush=True)
    if not count:
        raise ValueError(f"--only {config.only}: no comparison has this in its name")
    if found["comparisons"]:
        draw(found["comparisons"], ROOT / f"docs/images/performance-{device.type}.png")
        head = ["recipe", "what", "ours", "baseline", "ratio", "ms", "baseline, ms", "memory", "baseline, memory"]
        write_table(device.type, head, list(rows(found["comparisons"])))
    if failed:
        raise ValueError("\n".join(failed))


def open_results(file: Path, device: torch.device) -> dict[str, Any]:
    """What was measured on this machine with these versions, and what the machine is worth now."""
    speed = measure_machine(recipe_conv(CONFIGS / "characters"), device=device)
    own = {**speed._asdict(), "diffusers": diffusers.__version__, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT")}
    before = json.loads(file.read_bytes()) if file.is_file() else {}
    same = all(before.get(name) == own[name] for name in ("processor", "cores", "torch", "diffusers"))
    return {**own, "comparisons": before["comparisons"] if same else {}}


main = command(RunConfig, run, __doc__)

if __name__ == "__main__":
    main()
