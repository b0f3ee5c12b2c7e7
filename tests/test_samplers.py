"""Samplers and time grids, against a mixture of Gaussians whose diffusion is known exactly, and against diffusers."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SAMPLERS, Sampler, ddim_invert, final_latents, get_sampler
from ldm.diffusion.timesteps import SCHEDULES, make_timesteps
from ldm.evaluation.analytic import GaussianMixture

PATHS = ["linear", "scaled_linear", "cosine", "flow", "edm"]
DATA = GaussianMixture()
# 3M starts with a step of order 1 and one of order 2, so the whole is of order 2.
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m_sde": 2, "dpmpp_sde": 2, "unipc": 3}


def denoiser_of(network: Callable[[Tensor, Tensor], Tensor], process: Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """The Denoiser of a network that is called with its own timestep."""
    return process.denoiser(lambda z, t: network(z, process.network_timestep(t).to(z)))


every_path = pytest.mark.parametrize("path", PATHS)


def process_of(path: str, prediction: str = "v", **more: object) -> Diffusion:
    kind = "log_normal" if path == "edm" else "uniform"
    return Diffusion(
        DiffusionConfig.from_dict(
            {"noise_schedule": path, "prediction": prediction, "t_distribution": kind, **more}, source=path
        )
    )


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def without_noise(name: str) -> Sampler:
    return get_sampler(name, None if SAMPLERS[name][1] is None else 0.0)


def no_noise(number: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def inner_grid(process: Diffusion, start: float, end: float, steps: int) -> torch.Tensor:
    """Even in log SNR between two times inside the path, where its ends spoil no order."""
    level = torch.linspace(*(process.noise_to_signal(double(t)).log().item() for t in (start, end)), steps + 1).double()
    return torch.cat([double(start), process.t_from_noise_to_signal(level.exp())[1:-1], double(end)])


@every_path
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str, path: str) -> None:
    """Halving the step divides the error by 2 ** order."""
    process, start, end = process_of(path), 0.9, 0.4
    z = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
    exact = DATA.flow(z, process, double(start), double(end))
    errors = []
    for steps in (32, 64, 128, 256):
        grid = inner_grid(process, start, end, steps)
        found = final_latents(without_noise(name)(DATA.denoiser(process), process, z, grid, fresh_noise=no_noise))
        errors.append((found - exact).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert rates[-1] == pytest.approx(ORDERS[name], abs=0.15), f"errors {errors}, rates {rates}"


@every_path
@pytest.mark.parametrize("grid", SCHEDULES)
def test_the_whole_way_from_noise_to_data(grid: str, path: str) -> None:
    """64 steps of DPM++ 2M from t = 1 to the data, on every grid that the path can carry."""
    process = process_of(path)
    if (path == "flow" and grid in ("karras", "exponential", "log_snr")) or (
        grid == "leading" and (not process.discrete or process.config.zero_terminal_snr)
    ):
        with pytest.raises(ValueError, match=f"grid {grid}.*choose trailing|grid exponential.*choose trailing"):
            make_timesteps(process, 8, grid)
        return
    own = make_timesteps(process, 64, grid)
    z = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
    exact = DATA.flow(z, process, own[0], own[-1])
    found = final_latents(get_sampler("dpmpp_2m")(DATA.denoiser(process), process, z, own, fresh_noise=no_noise))
    assert (found - exact).abs().max() < 0.06


@every_path
@pytest.mark.parametrize("name", [name for name, (_, eta) in SAMPLERS.items() if eta is not None])
def test_fresh_noise_leaves_the_distribution_as_it_is(name: str, path: str) -> None:
    """20,000 samples with all the noise that a sampler can take have the moments of the data."""
    process, count = process_of(path), 20_000
    generator = torch.Generator().manual_seed(7)

    def fresh(number: int) -> torch.Tensor:
        return torch.randn(count, 1, generator=generator, dtype=torch.float64)

    walk = get_sampler(name, 1.0)
    found = final_latents(
        walk(DATA.denoiser(process), process, fresh(0), make_timesteps(process, 250), fresh_noise=fresh)
    )
    for order, allowed in ((1, 0.03), (2, 0.05), (3, 0.05)):
        assert (found**order).mean().item() == pytest.approx(DATA.moment(order), abs=allowed)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
@every_path
def test_every_prediction_takes_the_same_way(path: str, prediction: str) -> None:
    """A network that answers perfectly, in whatever terms, leads every sampler to the same end."""
    if (path, prediction) == ("flow", "epsilon"):
        pytest.skip("refused: it says nothing about the data at t = 1")
    process = process_of(path, prediction)
    z = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)[:, None]
    for name in SAMPLERS:
        fresh = lambda number: torch.full_like(z, 0.1 * number)  # noqa: E731
        ends = [
            final_latents(get_sampler(name)(guess, process, z, make_timesteps(process, 9), fresh_noise=fresh))
            for guess in (DATA.denoiser(process), DATA.network(process))
        ]
        torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
@every_path
def test_steps_asked_are_network_calls_made(path: str, name: str) -> None:
    process = process_of(path)
    seen = []

    def network(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append(timestep[0].item())
        return torch.zeros_like(z)

    fresh = lambda number: torch.zeros(1)  # noqa: E731
    walk = get_sampler(name)(
        denoiser_of(network, process), process, torch.randn(2, 1, 2, 2), make_timesteps(process, 7), fresh_noise=fresh
    )
    steps = list(walk)
    assert len(steps) == 7 and len(seen) == (13 if name in ("heun", "dpmpp_sde") else 7)
    assert all(step.z.isfinite().all() and step.z.dtype == torch.float32 for step in steps)
    assert max(seen) <= 1000 + 96 and sorted(seen, reverse=True) == seen  # 250 ln 80 on the EDM path


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", ["scaled_linear", "cosine"])
def test_zero_terminal_snr_is_carried(path: str, name: str) -> None:
    """From t = 1 without any signal: all stay finite, and those without noise end in the data."""
    process = process_of(path, zero_terminal_snr=True)
    z = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
    exact = DATA.flow(z, process, double(1.0), double(0.0))
    own = make_timesteps(process, 200, "linspace")
    found = final_latents(
        without_noise(name)(DATA.denoiser(process), process, z, own, fresh_noise=torch.zeros_like(z).mul)
    )
    assert found.isfinite().all()
    if name != "lcm":
        assert (found - exact).abs().max() < 0.12


@every_path
def test_inversion_undoes_euler(path: str) -> None:
    """Down with euler and up again: what is missed falls with the steps, as the order of both says."""
    process = process_of(path)
    z = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
    errors = []
    for steps in (50, 200, 800):
        grid = make_timesteps(process, steps, "linspace")
        data = final_latents(get_sampler("euler")(DATA.denoiser(process), process, z, grid, fresh_noise=no_noise))
        errors.append((final_latents(ddim_invert(DATA.denoiser(process), process, data, grid)) - z).abs().max().item())
    assert errors[0] < 0.4 and errors[2] < 0.04 and errors[0] > 2 * errors[1] > 4 * errors[2], errors


def test_ddpm_and_euler_ancestral_are_ddim_with_all_its_noise() -> None:
    process = process_of("cosine")
    denoise, z = DATA.denoiser(process), torch.randn(6, 1, dtype=torch.float64)
    fresh = lambda number: torch.full((6, 1), 0.1 * number, dtype=torch.float64)  # noqa: E731
    ends = {
        (name, eta): final_latents(
            get_sampler(name, eta)(denoise, process, z, make_timesteps(process, 9), fresh_noise=fresh)
        )
        for name, eta in (("ddim", None), ("euler", None), ("ddim", 1.0), ("ddpm", None), ("euler_ancestral", None))
    }
    torch.testing.assert_close(ends["euler", None], ends["ddim", None])
    torch.testing.assert_close(ends["ddpm", None], ends["ddim", 1.0])
    torch.testing.assert_close(ends["euler_ancestral", None], ends["ddim", 1.0])
    assert (ends["ddim", None] - ends["ddim", 1.0]).abs().max() > 1e-2


def test_ddpm_step_is_the_posterior_of_ho_et_al() -> None:
    """Equation 7: mean and variance of q(x_{t-1} | x_t, x_0), for neighbouring steps of the linear schedule."""
    process = Diffusion(DiffusionConfig(noise_schedule="linear"))
    t, s = double(0.5), double(0.499)
    bar_t, bar_s = process.alpha(t) ** 2, process.alpha(s) ** 2
    beta = 1 - bar_t / bar_s
    z, data = double(0.8)[:, None], double(-0.3)[:, None]
    mean = (bar_s.sqrt() * beta * data + (1 - beta).sqrt() * (1 - bar_s) * z) / (1 - bar_t)
    std = (beta * (1 - bar_s) / (1 - bar_t)).sqrt()
    for noise in (0.0, 1.0):
        fresh = lambda number, noise=noise: double(noise)[:, None]  # noqa: E731
        walk = get_sampler("ddpm")(lambda *_: data, process, z, torch.cat([t, s]), fresh_noise=fresh)
        torch.testing.assert_close(final_latents(walk), mean + noise * std)


def test_the_edm_path_with_v_is_edm_preconditioning() -> None:
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1, where the data's deviation is 1."""
    process = process_of("edm")
    sigma = double(0.002, 0.3, 1.0, 7.0, 80.0)
    t = process.t_from_noise_to_signal(sigma)
    torch.testing.assert_close(process.noise_to_signal(t), sigma)
    data, noise, answer = torch.randn(3, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c_in, c_skip, c_out = (sigma**2 + 1).rsqrt(), 1 / (sigma**2 + 1), sigma * (sigma**2 + 1).rsqrt()
    x = data + sigma[:, None] * noise
    z = process.add_noise(data, noise, t)
    torch.testing.assert_close(z, c_in[:, None] * x)
    torch.testing.assert_close(process.predict_x0(-answer, z, t), c_skip[:, None] * x + c_out[:, None] * answer)
    torch.testing.assert_close(process.network_timestep(t), 1000 * sigma.log() / 4)


# Grids.


@every_path
@given(st.integers(1, 50), st.sampled_from(["trailing", "linspace", "beta"]))
@settings(max_examples=20)
def test_times_fall_to_zero(path: str, steps: int, grid: str) -> None:
    own = make_timesteps(process_of(path), steps, grid)
    assert len(own) == steps + 1 and own[0] == 1 and own[-1].abs() < 1e-12 and (own.diff() < 0).all()


def test_grids_are_those_of_stable_diffusion() -> None:
    """The indices of 20 steps that diffusers and CompVis use."""
    process = process_of("scaled_linear", "epsilon")
    index = {
        grid: process.network_timestep(make_timesteps(process, 20, grid)[:-1])
        for grid in ("trailing", "leading", "linspace")
    }
    assert index["trailing"].round().tolist() == list(range(999, 0, -50))
    assert index["leading"].round().tolist() == list(range(951, 0, -50))
    assert index["linspace"][:2].tolist() == pytest.approx([999, 946.42], abs=0.01) and index["linspace"][-1] < 1e-9
    roots = process.noise_to_signal(make_timesteps(process, 20, "karras")[:-1]) ** (1 / 7)
    assert roots.diff().std().item() < 1e-9
    assert process.noise_to_signal(make_timesteps(process, 20, "log_snr")[:-1]).log().diff().std().item() < 1e-9


def test_beta_grid_is_the_quantiles_of_the_distribution() -> None:
    torch.manual_seed(0)
    drawn = torch.distributions.Beta(double(0.6), double(0.6)).sample((200_000,)).flatten()
    wanted = torch.linspace(1, 0, 11, dtype=torch.float64)
    torch.testing.assert_close(
        make_timesteps(process_of("flow"), 10, "beta"), drawn.quantile(wanted), rtol=0, atol=5e-3
    )


def test_resolution_shift_noises_earlier() -> None:
    """Esser et al. 2024, equation 23: t = 0.5 becomes 3 / 4 with shift 3; the inverse undoes it."""
    process = process_of("flow", "flow", shift=3)
    assert process.sigma(double(0.5)).item() == pytest.approx(0.75)
    assert process.network_timestep(double(0.5)).item() == pytest.approx(750)
    t = torch.linspace(0, 0.99, 12, dtype=torch.float64)
    torch.testing.assert_close(process.t_from_noise_to_signal(process.noise_to_signal(t)), t)


def test_a_list_of_times_is_a_grid() -> None:
    process = process_of("flow")
    assert make_timesteps(process, 3, (1.0, 0.6, 0.1)).tolist() == [1.0, 0.6, 0.1, 0.0]
    with pytest.raises(ValueError, match="4 steps need as many times, not 3"):
        make_timesteps(process, 4, (1.0, 0.6, 0.1))
    for bad in ((0.5, 0.6), (1.2, 0.1), (0.5, 0.0)):
        with pytest.raises(ValueError, match="must fall, and lie above 0 and at most at 1"):
            make_timesteps(process, 2, bad)


def test_bad_input_is_told() -> None:
    process = process_of("flow")
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        make_timesteps(process, 0)
    with pytest.raises(ValueError, match="grid 'sgm' is unknown: choose one of trailing, leading"):
        make_timesteps(process, 4, "sgm")
    with pytest.raises(ValueError, match="grid karras.*no signal, as here at t = 1: choose trailing"):
        make_timesteps(process, 4, "karras")
    with pytest.raises(ValueError, match="grid leading starts short of t = 1"):
        make_timesteps(process, 4, "leading")
    with pytest.raises(ValueError, match="grid leading has at most 999 steps, not 1000: choose trailing"):
        make_timesteps(process_of("linear"), 1000, "leading")
    with pytest.raises(ValueError, match="grid leading .* where this path has its zero terminal SNR: choose trailing"):
        make_timesteps(process_of("linear", "v", zero_terminal_snr=True), 4, "leading")
    for steps in (1, 334, 500, 999):
        assert (make_timesteps(process_of("linear"), steps, "leading").diff() < 0).all()
    with pytest.raises(ValueError, match="sampler 'plms' is unknown: choose one of ddpm, ddim, euler"):
        get_sampler("plms")
    with pytest.raises(ValueError, match="sampler unipc has no eta to choose: leave it out"):
        get_sampler("unipc", 0.5)
    with pytest.raises(ValueError, match="eta must be between 0 and 1, not 2"):
        get_sampler("ddim", 2)
    for values, text in {
        '{"noise_schedule": "flow", "prediction": "v", "zero_terminal_snr": true}': "zero_terminal_snr: the flow schedule",
        '{"noise_schedule": "edm", "prediction": "v"}': "log_normal and noise_schedule edm go together",
        '{"shift": 3}': "shift 3 belongs to noise_schedule flow, not scaled_linear",
        '{"gamma": 5}': "gamma and snr_floor need a loss_weighting",
        '{"loss_weighting": "p2", "gamma": 1, "snr_floor": 1}': "snr_floor belongs to loss_weighting min_snr",
        '{"loss_weighting": "min_snr"}': "loss_weighting min_snr needs gamma",
    }.items():
        with pytest.raises(ValueError, match=text):
            DiffusionConfig.model_validate_json(values)


# Against diffusers.

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
THEIRS = {
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}),
    "ddim eta 0.5": ("DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    "dpmpp_2m_sde": (
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "zero", "algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": ("UniPCMultistepScheduler", {"final_sigmas_type": "zero"}),
    "lcm": ("LCMScheduler", {"set_alpha_to_one": True}),  # steps of its own, and a skip of less than 1e-5 from z
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", THEIRS)
def test_samplers_agree_with_diffusers(
    case: str, prediction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same betas, times, noise and network answers take the same way to 1e-5 of the largest value.

    Their schedules are float32 numbers whatever the samples are, so float64 comes no nearer.
    """
    diffusers = pytest.importorskip("diffusers")
    cls, settings = THEIRS[case]
    name, _, eta = case.partition(" eta ")
    scheduler = getattr(diffusers, cls)(**SD, prediction_type=prediction, **settings)
    process = Diffusion(DiffusionConfig(prediction="epsilon" if prediction == "epsilon" else "v"))

    def network(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z) * 0.7 + (timestep / 1000).view(-1, 1, 1, 1) * 0.1

    noises = torch.randn(21, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = iter(noises[1:])
    module = f"diffusers.schedulers.{scheduler.__module__.split('.')[-1]}.randn_tensor"
    monkeypatch.setattr(module, lambda *args, **kwargs: next(drawn), raising=False)
    scheduler.set_timesteps(20)
    in_sigma = name.startswith("euler")  # theirs hold z / alpha there
    sample = noises[0] / process.alpha(torch.tensor(1.0)) if in_sigma else noises[0]
    extra = {"eta": float(eta)} if eta else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t)
        sample = scheduler.step(network(scaled, t.expand(2).float()), t, sample, return_dict=False, **extra)[0]
    own = make_timesteps(
        process, 20, ((scheduler.timesteps + 1) / 1000).double().tolist() if name == "lcm" else "trailing"
    )
    fresh = lambda number: noises[1 + number]  # noqa: E731
    walk = get_sampler(name, float(eta) if eta else None)
    ours = final_latents(walk(denoiser_of(network, process), process, noises[0], own, fresh_noise=fresh))
    torch.testing.assert_close(ours.to(sample.dtype), sample, rtol=0, atol=1e-5 * max(1.0, sample.abs().max().item()))


def test_heun_differs_from_diffusers_by_its_mean_alone() -> None:
    """Theirs averages the guesses of the noise, ours those of the data: half the step, a quarter of the difference."""
    diffusers = pytest.importorskip("diffusers")
    process = process_of("scaled_linear", "epsilon")
    network = lambda z, timestep: torch.tanh(z) * 0.7  # noqa: E731
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    differences = []
    for steps in (40, 80, 160):
        scheduler = diffusers.HeunDiscreteScheduler(**SD)
        scheduler.set_timesteps(steps)
        sample = start / process.alpha(torch.tensor(1.0))
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t)
            sample = scheduler.step(network(scaled, t), t, sample, return_dict=False)[0]
        own = make_timesteps(process, steps)
        ours = final_latents(
            get_sampler("heun")(denoiser_of(network, process), process, start, own, fresh_noise=no_noise)
        )
        differences.append((ours - sample).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(differences)]
    assert min(rates) > 1.2, f"differences {differences}"


def test_flow_euler_with_shift_agrees_with_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    process = process_of("flow", "flow", shift=3)
    network = lambda z, timestep: torch.tanh(z) + timestep.view(-1, 1) / 1000  # noqa: E731
    start = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    sample = start
    for t in scheduler.timesteps:
        sample = scheduler.step(network(sample, t.expand(4)), t, sample, return_dict=False)[0]
    ours = final_latents(
        get_sampler("euler")(
            denoiser_of(network, process), process, start, make_timesteps(process, 10), fresh_noise=no_noise
        )
    )
    torch.testing.assert_close(ours, sample, rtol=1e-5, atol=1e-5)
