"""The mathematics of diffusion, against closed forms and published numbers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import Config
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.process import Process, ProcessConfig, denoiser, times
from ldm.diffusion.samplers import SAMPLERS, find_sampler, run

VALID = [
    ProcessConfig(path=path, prediction=prediction, zero_terminal_snr=zero)  # type: ignore[arg-type]
    for path in ("linear", "scaled_linear", "cosine", "flow")
    for prediction in ("epsilon", "v", "x0", "flow")
    for zero in (False, True)
    if not (path == "flow" and (zero or prediction == "epsilon")) and not (zero and prediction == "epsilon")
]
NAMES = [f"{c.path}-{c.prediction}{'-zero' if c.zero_terminal_snr else ''}" for c in VALID]
every_process = pytest.mark.parametrize("config", VALID, ids=NAMES)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussian_denoiser(process: Process, mean: float, std: float):  # type: ignore[no-untyped-def]
    """The exact denoiser of data from N(mean, std^2)."""

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)

    return denoise


@every_process
def test_to_data_inverts_target(config: Config) -> None:
    process = Process(config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    for t in (double(*[0.001] * 5), double(0.1, 0.3, 0.5, 0.7, 0.9), double(*[1.0] * 5)):
        z_t = process.mix(z, noise, t)
        torch.testing.assert_close(process.to_data(process.target(z, noise, t), z_t, t), z, rtol=0, atol=1e-7)


def test_scaled_linear_is_stable_diffusions_schedule() -> None:
    process = Process(ProcessConfig())
    first, last = double(1 / 1000), double(1.0)
    assert process.alpha(first).item() ** 2 == pytest.approx(0.99915, abs=1e-9)
    assert process.alpha(last).item() ** 2 == pytest.approx(0.0046600985, abs=1e-9)
    assert (process.sigma(first) / process.alpha(first)).item() == pytest.approx(0.0291672, abs=1e-6)
    assert (process.sigma(last) / process.alpha(last)).item() == pytest.approx(14.6146412, abs=1e-5)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step() -> None:
    process = Process(ProcessConfig(prediction="v", zero_terminal_snr=True))
    assert process.alpha(double(1.0)).item() == 0
    assert process.alpha(double(0.999)).item() ** 2 == pytest.approx(1.968e-7, rel=1e-3)
    assert process.alpha(double(0.001)).item() ** 2 == pytest.approx(0.99915, abs=1e-9)


@pytest.mark.parametrize("path", ["linear", "scaled_linear", "cosine", "flow"])
def test_paths_start_at_data_and_lose_signal_monotonically(path: str) -> None:
    process = Process(ProcessConfig(path=path, prediction="v"))  # type: ignore[arg-type]
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert process.alpha(t[0]).item() == 1 and process.sigma(t[0]).item() == 0
    assert (process.alpha(t).diff() < 0).all() and (process.sigma(t).diff() > -1e-12).all()
    if path != "flow":
        torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))


def test_float32_times_hit_the_same_grid_points_as_float64() -> None:
    process = Process(ProcessConfig())
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(process.alpha(t.float()).double(), process.alpha(t), rtol=0, atol=1e-7)


def test_discrete_timesteps_are_the_indices_of_the_betas() -> None:
    grid = times(20)[:-1]
    steps = Process(ProcessConfig()).timestep(grid).round().long().tolist()
    assert steps == list(range(999, 0, -50))
    assert Process(ProcessConfig(path="flow", prediction="flow")).timestep(double(0.5)).item() == 500


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
@pytest.mark.parametrize("path", ["cosine", "flow"])
@pytest.mark.parametrize(("floor", "gamma"), [(None, 5.0), (1.0, None), (1.0, 5.0)])
def test_clamped_snr_is_the_same_objective_for_every_prediction(
    path: str, prediction: str, floor: float | None, gamma: float | None
) -> None:
    """Weight x squared error of the target equals clamped SNR x squared error of the data."""
    config = ProcessConfig(path=path, prediction=prediction, min_snr_gamma=gamma, snr_floor=floor)  # type: ignore[arg-type]
    process = Process(config)
    t = double(0.05, 0.2, 0.5, 0.8, 0.95)
    generator = torch.Generator().manual_seed(0)
    z, noise, guess = torch.randn(3, 5, 1, 2, 2, generator=generator, dtype=torch.float64)
    z_t, target = process.mix(z, noise, t), process.target(z, noise, t)
    error_in_data = (process.to_data(guess, z_t, t) - z).square().flatten(1).mean(1)
    error_in_target = (guess - target).square().flatten(1).mean(1)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    torch.testing.assert_close(process.weight(t) * error_in_target, snr.clamp(floor, gamma) * error_in_data)


def test_clamped_snr_is_finite_where_the_signal_is_zero() -> None:
    for prediction in ("v", "x0", "flow"):
        config = ProcessConfig(prediction=prediction, zero_terminal_snr=True, min_snr_gamma=5, snr_floor=1)  # type: ignore[arg-type]
        assert Process(config).weight(double(0.0, 0.001, 1.0)).isfinite().all()


def test_snr_floor_above_its_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="snr_floor 6 is above min_snr_gamma 5"):
        ProcessConfig(snr_floor=6, min_snr_gamma=5)


@pytest.mark.parametrize("path", ["flow", "linear"])
def test_epsilon_without_signal_is_refused_with_the_reason(path: str) -> None:
    with pytest.raises(ValueError, match="epsilon says nothing about the data where the signal is zero"):
        ProcessConfig(path=path, prediction="epsilon", zero_terminal_snr=path == "linear")  # type: ignore[arg-type]


@given(st.floats(0, 1, exclude_max=True, width=32), st.sampled_from(["uniform", "stratified", "logit_normal"]))
def test_drawn_times_are_inside_the_path(u: float, kind: str) -> None:
    for path in ("cosine", "flow"):
        process = Process(ProcessConfig(path=path, prediction="v", times=kind))  # type: ignore[arg-type]
        t = process.draw_times(torch.full((4,), u), torch.arange(4), 4)
        assert ((t > 0) & (t <= 1)).all()
        if path == "cosine":
            assert torch.equal((t * 1000).round() / 1000, t)


def test_stratified_times_cover_every_part_of_the_path() -> None:
    process = Process(ProcessConfig(path="flow", prediction="flow", times="stratified"))
    t = process.draw_times(torch.rand(64, generator=torch.Generator().manual_seed(0)), torch.arange(64), 64)
    assert torch.equal((t * 64).floor(), torch.arange(64.0))


def test_logit_normal_times_have_the_right_distribution() -> None:
    process = Process(ProcessConfig(path="flow", prediction="flow", times="logit_normal"))
    t = process.draw_times(torch.rand(50_000, generator=torch.Generator().manual_seed(0)), torch.arange(50_000), 50_000)
    logit = torch.log(t / (1 - t))
    assert logit.mean().item() == pytest.approx(0, abs=0.02) and logit.std().item() == pytest.approx(1, abs=0.02)


# Samplers.


@pytest.mark.parametrize("path", ["scaled_linear", "flow"])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name: str, order: int, path: str) -> None:
    """On Gaussian data the exact solution is known; halving the step divides the error by 2 ** order."""
    process = Process(ProcessConfig(path=path, prediction="v"))  # type: ignore[arg-type]
    mean, std, start, end = 0.7, 0.3, 0.9, 0.3
    denoise = gaussian_denoiser(process, mean, std)

    def marginal(t: float) -> tuple[float, float]:
        alpha, sigma = process.alpha(double(t)).item(), process.sigma(double(t)).item()
        return alpha * mean, math.sqrt(alpha**2 * std**2 + sigma**2)

    (mean_a, std_a), (mean_b, std_b) = marginal(start), marginal(end)
    standard = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = mean_b + std_b * standard
    errors = []
    for steps in (20, 40, 80):
        grid = torch.linspace(start, end, steps + 1, dtype=torch.float64)
        found = run(SAMPLERS[name](denoise, process, mean_a + std_a * standard, grid, eta=0.0, fresh_noise=no_noise))
        errors.append((found - exact).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(rates) > order - 0.25, f"errors {errors}"


def no_noise(step: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


@pytest.mark.parametrize("name", SAMPLERS)
@every_process
def test_every_sampler_makes_the_data_from_noise(config: ProcessConfig, name: str) -> None:
    """From pure noise down to t = 0 on every path: the moments of the data come out."""
    process = Process(config)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    fresh = lambda step: torch.randn(4000, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    found = run(
        SAMPLERS[name](gaussian_denoiser(process, 0.5, 0.4), process, z, times(100), eta=0.0, fresh_noise=fresh)
    )
    assert found.mean().item() == pytest.approx(0.5, abs=0.05)
    assert found.std().item() == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize(("name", "calls"), [("ddpm", 7), ("ddim", 7), ("euler", 7), ("heun", 13), ("dpmpp_2m", 7)])
def test_steps_asked_are_network_calls_made(name: str, calls: int) -> None:
    process = Process(ProcessConfig(prediction="v"))
    seen = []

    def network(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append(timestep[0].item())
        return torch.zeros_like(z)

    walk = SAMPLERS[name](
        denoiser(network, process),
        process,
        torch.randn(2, 1, 2, 2),
        times(7),
        eta=0.0,
        fresh_noise=lambda i: torch.zeros(1),
    )
    assert len(list(walk)) == 7 and len(seen) == calls
    assert max(seen) == 999 and min(seen) >= 0


def test_ddim_with_eta_one_is_ddpm_and_euler_is_ddim() -> None:
    process = Process(ProcessConfig(path="cosine", prediction="v"))
    denoise, z = gaussian_denoiser(process, 0.2, 0.5), torch.randn(6, 1, dtype=torch.float64)
    fresh = lambda i: torch.full((6, 1), 0.1 * i, dtype=torch.float64)  # noqa: E731
    results = {
        (name, eta): run(SAMPLERS[name](denoise, process, z, times(9), eta=eta, fresh_noise=fresh))
        for name, eta in (("ddim", 0.0), ("euler", 0.0), ("ddim", 1.0), ("ddpm", 0.0))
    }
    torch.testing.assert_close(results["euler", 0.0], results["ddim", 0.0])
    torch.testing.assert_close(results["ddpm", 0.0], results["ddim", 1.0])
    assert (results["ddim", 0.0] - results["ddim", 1.0]).abs().max() > 1e-2


def test_ddpm_step_is_the_posterior_of_ho_et_al() -> None:
    """Equation 7: mean and variance of q(x_{t-1} | x_t, x_0), for neighbouring steps of the linear schedule."""
    process = Process(ProcessConfig(path="linear"))
    t, s = double(0.5), double(0.499)
    bar_t, bar_s = process.alpha(t) ** 2, process.alpha(s) ** 2
    beta = 1 - bar_t / bar_s
    z, data = double(0.8)[:, None], double(-0.3)[:, None]
    mean = (bar_s.sqrt() * beta * data + (1 - beta).sqrt() * (1 - bar_s) * z) / (1 - bar_t)
    std = (beta * (1 - bar_s) / (1 - bar_t)).sqrt()
    grid = torch.cat([t, s])
    for noise in (0.0, 1.0):
        fresh = lambda i, noise=noise: double(noise)[:, None]  # noqa: E731
        found = run(SAMPLERS["ddpm"](lambda *_: data, process, z, grid, eta=0.0, fresh_noise=fresh))
        torch.testing.assert_close(found, mean + noise * std)


@given(st.integers(1, 50))
@settings(max_examples=20)
def test_times_fall_to_zero(steps: int) -> None:
    grid = times(steps)
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        times(0)
    with pytest.raises(ValueError, match="sampler 'plms' is unknown: choose one of ddpm, ddim, euler, heun, dpmpp_2m"):
        find_sampler("plms")
    with pytest.raises(ValueError, match="flow path ends in pure noise already"):
        ProcessConfig(path="flow", prediction="v", zero_terminal_snr=True)


# Guidance.


def test_guidance_extrapolates_between_the_two_answers() -> None:
    def both(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert len(z) == len(t) == 4
        return torch.cat([torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)])

    z, t = torch.zeros(2, 1), torch.zeros(2)
    for scale, value in ((0.0, 1.0), (1.0, 3.0), (7.5, 16.0)):
        assert classifier_free(both, scale)(z, t).tolist() == [[value], [value]]


def test_schedules_agree_with_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    names = {"linear": ("linear", 1e-4, 0.02), "scaled_linear": ("scaled_linear", 0.00085, 0.012)}
    grid = torch.arange(1, 1001, dtype=torch.float64) / 1000
    for path, (schedule, start, end) in names.items():
        theirs = diffusers.DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end).alphas_cumprod.double()
        ours = Process(ProcessConfig(path=path)).alpha(grid) ** 2  # type: ignore[arg-type]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=4.8e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samplers_agree_with_diffusers_on_equal_grids(prediction: str) -> None:
    """Same betas, times, noise and network answers: DDIM and DPM++ 2M take the same path to 1e-4 in float32."""
    diffusers = pytest.importorskip("diffusers")
    common = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": prediction}
    theirs = {
        "ddim": diffusers.DDIMScheduler(
            **common, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        ),
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(
            **common, timestep_spacing="trailing", final_sigmas_type="zero", lower_order_final=True
        ),
    }
    process = Process(ProcessConfig(prediction="epsilon" if prediction == "epsilon" else "v"))

    def network(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z) * 0.7 + (timestep / 1000).view(-1, 1, 1, 1) * 0.1

    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for name, scheduler in theirs.items():
        scheduler.set_timesteps(20)
        sample = start.clone()
        for t in scheduler.timesteps:
            sample = scheduler.step(network(sample, t.expand(2).float()), t, sample, return_dict=False)[0]
        ours = run(SAMPLERS[name](denoiser(network, process), process, start, times(20), eta=0.0, fresh_noise=no_noise))
        torch.testing.assert_close(ours, sample, rtol=1e-4, atol=1e-4)
