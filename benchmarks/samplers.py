"""Measure every sampler on data whose solution is known exactly: the tables and the image of docs/samplers.md.

    python benchmarks/samplers.py

Error: the largest distance from the exact end of the probability flow, over 65 starting points between -2 and 2, of a
mixture of Gaussians of standard deviation 1; from t = 1 to t = 0. Noise: the same samplers with eta 1, by the moments
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
from analytic import GaussianMixture

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SAMPLERS, final_latents, get_sampler
from ldm.diffusion.timesteps import SCHEDULES, make_timesteps

ROOT = Path(__file__).parents[1]
STEPS = (8, 16, 32, 64, 128, 256)
NOISE_SCHEDULES = ("linear", "scaled_linear", "cosine", "flow", "edm")
SAME = {"ddpm": "ddim", "euler_ancestral": "ddim", "dpmpp_2m_sde": "dpmpp_2m", "log_snr": "exponential"}
BEST = {"linear": "karras", "scaled_linear": "karras", "cosine": "trailing", "flow": "trailing", "edm": "karras"}
MARK = "<!-- measured -->"
DATA = GaussianMixture()

Results = dict[str, list[float]]


def diffusion_of(noise_schedule: str, prediction: str) -> Diffusion:
    """ValueError where noise schedule and prediction do not go together."""
    t_distribution = "log_normal" if noise_schedule == "edm" else "uniform"
    values = {"noise_schedule": noise_schedule, "prediction": prediction, "t_distribution": t_distribution}
    return Diffusion(DiffusionConfig.from_dict(values, source="samplers"))


def max_error(diffusion: Diffusion, sampler: str, timesteps: str, steps: int) -> float:
    """Largest distance to the exact solution, without noise and through the diffusion's own prediction."""
    ts = make_timesteps(diffusion, steps, timesteps)
    z = torch.linspace(-2, 2, 65, dtype=torch.float64)[:, None]
    exact = DATA.flow(z, diffusion, ts[0], ts[-1])
    sample = get_sampler(sampler, None if SAMPLERS[sampler][1] is None else 0.0)
    noise_sampler = torch.zeros_like(z).mul
    z = final_latents(sample(DATA.network_denoiser(diffusion), diffusion, z, ts, noise_sampler=noise_sampler))
    return (z - exact).abs().max().item()


def moment_errors(diffusion: Diffusion, sampler: str, steps: int = 250, count: int = 20_000) -> list[float]:
    """Errors of the first three moments with eta 1."""
    generator = torch.Generator().manual_seed(0)

    def noise_sampler(index: int) -> torch.Tensor:
        return torch.randn(count, 1, generator=generator, dtype=torch.float64)

    z, ts = noise_sampler(0), make_timesteps(diffusion, steps)
    sample = get_sampler(sampler, 1.0)
    z = final_latents(sample(DATA.denoiser(diffusion), diffusion, z, ts, noise_sampler=noise_sampler))
    return [(z**order).mean().item() - DATA.moment(order) for order in (1, 2, 3)]


def measure(noise_schedule: str, prediction: str) -> tuple[Results, Results]:
    """Errors by "noise_schedule prediction timesteps sampler" over STEPS, and for v the moments of those with noise."""
    torch.set_num_threads(1)
    try:
        diffusion = diffusion_of(noise_schedule, prediction)
    except ValueError:  # they do not go together
        return {}, {}
    errors = {}
    for timesteps, sampler in itertools.product(SCHEDULES, SAMPLERS):
        if sampler == "lcm" or {timesteps, sampler} & SAME.keys():
            continue
        try:
            values = [max_error(diffusion, sampler, timesteps, steps) for steps in STEPS]
        except ValueError:  # timesteps that the noise schedule does not allow
            continue
        errors[f"{noise_schedule} {prediction} {timesteps} {sampler}"] = values
    noisy = [name for name, (_, eta) in SAMPLERS.items() if eta is not None and name not in SAME]
    moments = {f"{noise_schedule} {name}": moment_errors(diffusion, name) for name in noisy if prediction == "v"}
    print(noise_schedule, prediction, flush=True)
    return errors, moments


def plot(errors: Results, file: Path) -> None:
    """Log-log, one panel for each noise schedule, with the timesteps that suit it."""
    figure, panels = plt.subplots(1, len(NOISE_SCHEDULES), figsize=(16, 4), sharey=True)
    for panel, noise_schedule in zip(panels, NOISE_SCHEDULES, strict=True):
        timesteps = BEST[noise_schedule]
        for name in SAMPLERS:
            if (key := f"{noise_schedule} v {timesteps} {name}") in errors:
                label = "dpmpp (two stages)" if name == "dpmpp_sde" else name.removesuffix("_sde")
                panel.loglog(STEPS, errors[key], marker="o", markersize=3, label=label)
        for order in (1, 2, 3):
            panel.loglog(STEPS, [0.5 * (8 / n) ** order for n in STEPS], color="lightgrey", linestyle=":", zorder=0)
        panel.set(title=f"{noise_schedule}, {timesteps}", xlabel="steps", ylim=(1e-5, 2))
        panel.set_xticks(STEPS, STEPS)
        panel.minorticks_off()
    panels[0].set_ylabel("largest error")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def tables(errors: Results, moments: Results) -> str:
    """Markdown: the errors, the largest over the predictions, and the errors of the moments."""
    lines = [
        "## Errors, by steps",
        "",
        "| noise schedule | timesteps | sampler | " + " | ".join(map(str, STEPS)) + " |",
        "|---" * (3 + len(STEPS)) + "|",
    ]
    merged: dict[tuple[str, str, str], list[float]] = {}
    for key, values in errors.items():
        noise_schedule, _, timesteps, sampler = key.split()
        largest = merged.get((noise_schedule, timesteps, sampler), values)
        merged[noise_schedule, timesteps, sampler] = [max(pair) for pair in zip(largest, values, strict=True)]
    for names, values in merged.items():
        lines.append(f"| {' | '.join(names)} | " + " | ".join(f"{v:.1e}" for v in values) + " |")
    lines += ["", "## Moments of 20,000 samples with eta 1, 250 steps of `trailing`", ""]
    lines += ["The data have mean 0.070, second moment 0.986 and third 0.124; the table has the differences.", ""]
    lines += ["| noise schedule | sampler | mean | second moment | third moment |", "|---|---|---|---|---|"]
    for key, values in moments.items():
        lines.append(f"| {' | '.join(key.split())} | " + " | ".join(f"{v:+.3f}" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, plot, and write the tables."""
    cases = list(itertools.product(NOISE_SCHEDULES, ("epsilon", "v", "x0", "flow")))
    errors: Results = {}
    moments: Results = {}
    with ProcessPoolExecutor() as pool:
        for more_errors, more_moments in pool.map(measure, *zip(*cases, strict=True)):
            errors |= more_errors
            moments |= more_moments
    rounded = {
        kind: {key: [float(f"{value:.3g}") for value in values] for key, values in results.items()}
        for kind, results in {"errors": errors, "moments": moments}.items()
    }
    versions = {"machine": platform.machine(), "torch": torch.__version__, "steps": STEPS}
    file = ROOT / "benchmarks/results/samplers.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**versions, **rounded}, indent=0))
    plot(errors, ROOT / "docs/images/samplers-error.png")
    document = ROOT / "docs/samplers.md"
    document.write_text(document.read_text().split(MARK)[0] + f"{MARK}\n\n{tables(errors, moments)}\n")


if __name__ == "__main__":
    main()
