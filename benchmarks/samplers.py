"""Measure every sampler on data whose solution is known exactly: docs/samplers.md's table and its picture.

    python benchmarks/samplers.py

Error: the largest distance from the exact end of the probability flow, over 65 starting points between -2 and 2, of a
mixture of Gaussians of deviation 1; from t = 1 to t = 0. Noise: the same samplers with all their noise, by the moments
of 20,000 samples.
"""

import itertools
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SAMPLERS, final_latents, get_sampler
from ldm.diffusion.timesteps import SCHEDULES, make_timesteps
from ldm.evaluation.analytic import GaussianMixture

ROOT = Path(__file__).parents[1]
STEPS = (8, 16, 32, 64, 128, 256)
PATHS = ("linear", "scaled_linear", "cosine", "flow", "edm")
SAME = {"ddpm": "ddim", "euler_ancestral": "ddim", "dpmpp_2m_sde": "dpmpp_2m", "log_snr": "exponential"}
BEST = {"linear": "karras", "scaled_linear": "karras", "cosine": "trailing", "flow": "trailing", "edm": "karras"}
MARK = "<!-- measured -->"
DATA = GaussianMixture()


def process_of(path: str, prediction: str) -> Diffusion:
    """A process, or ValueError where path and prediction do not go together."""
    values = {
        "noise_schedule": path,
        "prediction": prediction,
        "t_distribution": "log_normal" if path == "edm" else "uniform",
    }
    return Diffusion(DiffusionConfig.from_dict(values, source="samplers"))


def error(process: Diffusion, sampler: str, grid: str, steps: int) -> float:
    """Largest distance to the exact solution, without fresh noise and through the process's own prediction."""
    own = make_timesteps(process, steps, grid)
    z = torch.linspace(-2, 2, 65, dtype=torch.float64)[:, None]
    exact = DATA.flow(z, process, own[0], own[-1])
    walk = get_sampler(sampler, None if SAMPLERS[sampler][1] is None else 0.0)
    found = final_latents(walk(DATA.network(process), process, z, own, fresh_noise=torch.zeros_like(z).mul))
    return (found - exact).abs().max().item()


def moments(process: Diffusion, sampler: str, steps: int = 250, count: int = 20_000) -> list[float]:
    """What the first three moments are off by, with all the noise that the sampler takes."""
    generator = torch.Generator().manual_seed(0)

    def fresh(number: int) -> torch.Tensor:
        return torch.randn(count, 1, generator=generator, dtype=torch.float64)

    walk = get_sampler(sampler, 1.0)
    found = final_latents(
        walk(DATA.denoiser(process), process, fresh(0), make_timesteps(process, steps), fresh_noise=fresh)
    )
    return [(found**order).mean().item() - DATA.moment(order) for order in (1, 2, 3)]


Found = tuple[dict[str, list[float]], dict[str, list[float]]]


def measure(path: str, prediction: str) -> Found:
    """Errors by "path prediction grid sampler" over STEPS, and for v the moments of those with noise."""
    torch.set_num_threads(1)
    try:
        process = process_of(path, prediction)
    except ValueError:  # they do not go together
        return {}, {}
    errors = {}
    for grid, sampler in itertools.product(SCHEDULES, SAMPLERS):
        try:
            if sampler != "lcm" and not {grid, sampler} & SAME.keys():
                errors[f"{path} {prediction} {grid} {sampler}"] = [error(process, sampler, grid, n) for n in STEPS]
        except ValueError:  # a grid that the path can not carry
            continue
    noisy = [name for name in SAMPLERS if SAMPLERS[name][1] is not None and name not in SAME]
    noise = {f"{path} {name}": moments(process, name) for name in noisy} if prediction == "v" else {}
    print(path, prediction, flush=True)
    return errors, noise


def draw(errors: dict[str, list[float]], file: Path) -> None:
    """Log-log, one panel for each path, on the grid that suits it."""
    figure, panels = plt.subplots(1, len(PATHS), figsize=(16, 4), sharey=True)
    for panel, path in zip(panels, PATHS, strict=True):
        grid = BEST[path]
        for name in SAMPLERS:
            if (key := f"{path} v {grid} {name}") in errors:
                panel.loglog(
                    STEPS,
                    errors[key],
                    marker="o",
                    markersize=3,
                    label=name.removesuffix("_sde") if name != "dpmpp_sde" else "dpmpp (two stages)",
                )
        for order in (1, 2, 3):
            panel.loglog(STEPS, [0.5 * (8 / n) ** order for n in STEPS], color="lightgrey", linestyle=":", zorder=0)
        panel.set(title=f"{path}, {grid}", xlabel="steps", ylim=(1e-5, 2))
        panel.set_xticks(STEPS, STEPS)
        panel.minorticks_off()
    panels[0].set_ylabel("largest error")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main() -> None:
    """Measure, draw, and write the tables."""
    pairs = list(itertools.product(PATHS, ("epsilon", "v", "x0", "flow")))
    found: dict[str, dict[str, list[float]]] = {"errors": {}, "moments": {}}
    with ProcessPoolExecutor() as pool:
        for errors, noise in pool.map(measure, *zip(*pairs, strict=True)):
            found["errors"] |= errors
            found["moments"] |= noise
    results = ROOT / "benchmarks/results"
    results.mkdir(exist_ok=True)
    rounded = {kind: {k: [float(f"{v:.3g}") for v in values] for k, values in f.items()} for kind, f in found.items()}
    about = {"machine": platform.machine(), "torch": torch.__version__, "steps": STEPS}
    (results / "samplers.json").write_text(json.dumps({**about, **rounded}, indent=0))
    draw(found["errors"], ROOT / "docs/pictures/samplers-error.png")
    document = ROOT / "docs/samplers.md"
    document.write_text(document.read_text().split(MARK)[0] + f"{MARK}\n\n{tables(found)}\n")


def tables(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: the errors, the largest over the predictions, and what the moments are off by."""
    lines = [
        "## Errors, by steps",
        "",
        "| path | grid | sampler | " + " | ".join(map(str, STEPS)) + " |",
        "|---" * (3 + len(STEPS)) + "|",
    ]
    merged: dict[tuple[str, str, str], list[float]] = {}
    for key, values in found["errors"].items():
        path, _, grid, sampler = key.split()
        before = merged.get((path, grid, sampler), values)
        merged[path, grid, sampler] = [max(pair) for pair in zip(before, values, strict=True)]
    for (path, grid, sampler), values in merged.items():
        lines.append(f"| {path} | {grid} | {sampler} | " + " | ".join(f"{v:.1e}" for v in values) + " |")
    lines += ["", "## Moments of 20,000 samples with all the noise: eta 1, 250 steps of `trailing`", ""]
    lines += ["The data have mean 0.070, second moment 0.986 and third 0.124; the table tells what is off.", ""]
    lines += ["| path | sampler | mean | second moment | third moment |", "|---|---|---|---|---|"]
    for key, values in found["moments"].items():
        path, sampler = key.split()
        lines.append(f"| {path} | {sampler} | " + " | ".join(f"{v:+.3f}" for v in values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
