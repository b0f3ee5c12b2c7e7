"""Samplers and timesteps, against a mixture of Gaussians whose diffusion is known exactly, and against diffusers."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from analytic import GaussianMixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.diffusion.guidance import Denoiser
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SAMPLERS, NoiseSampler, ddim_invert, final_latents, get_sampler
from ldm.diffusion.timesteps import SCHEDULES, make_timesteps

NOISE_SCHEDULES = ["linear", "scaled_linear", "cosine", "flow", "edm"]
DATA = GaussianMixture()
# 3M starts with a step of order 1 and one of order 2, so the whole is of order 2.
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m_sde": 2, "dpmpp_sde": 2, "unipc": 3}

every_noise_schedule = pytest.mark.parametrize("noise_schedule", NOISE_SCHEDULES)


def diffusion_of(noise_schedule: str, prediction: str = "v", **more: object) -> Diffusion:
    t_distribution = "log_normal" if noise_schedule == "edm" else "uniform"
    values = {"noise_schedule": noise_schedule, "prediction": prediction, "t_distribution": t_distribution, **more}
    return Diffusion(DiffusionConfig.from_dict(values, source="test"))


def denoiser_of(network: Callable[[Tensor, Tensor], Tensor], diffusion: Diffusion) -> Denoiser:
    """The Denoiser of a network that is called with its own timestep."""
    return diffusion.denoiser(lambda z, t: network(z, diffusion.network_timestep(t).to(z)))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def points(limit: float = 1.5, count: int = 9) -> Tensor:
    """Starting points (count, 1) between -limit and limit."""
    return torch.linspace(-limit, limit, count, dtype=torch.float64)[:, None]


def no_noise(index: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def sample(
    name: str,
    denoiser: Denoiser,
    diffusion: Diffusion,
    z: Tensor,
    ts: Tensor,
    *,
    eta: float | None = None,
    noise_sampler: NoiseSampler = no_noise,
) -> Tensor:
    return final_latents(get_sampler(name, eta)(denoiser, diffusion, z, ts, noise_sampler=noise_sampler))


def eta_0(name: str) -> float | None:
    """The eta without noise, where the sampler has one."""
    return None if SAMPLERS[name][1] is None else 0.0


def inner_timesteps(diffusion: Diffusion, start: float, end: float, steps: int) -> Tensor:
    """Even in log-SNR between two t inside the schedule, where its ends spoil no order."""
    high, low = (diffusion.noise_to_signal(double(t)).log().item() for t in (start, end))
    level = torch.linspace(high, low, steps + 1, dtype=torch.float64)
    return torch.cat([double(start), diffusion.t_from_noise_to_signal(level.exp())[1:-1], double(end)])


@every_noise_schedule
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str, noise_schedule: str) -> None:
    """Halving the step divides the error by 2 ** order."""
    diffusion, start, end = diffusion_of(noise_schedule), 0.9, 0.4
    exact = DATA.flow(points(), diffusion, double(start), double(end))
    errors = []
    for steps in (32, 64, 128, 256):
        ts = inner_timesteps(diffusion, start, end, steps)
        z = sample(name, DATA.denoiser(diffusion), diffusion, points(), ts, eta=eta_0(name))
        errors.append((z - exact).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert rates[-1] == pytest.approx(ORDERS[name], abs=0.15), f"errors {errors}, rates {rates}"


@every_noise_schedule
@pytest.mark.parametrize("timesteps", SCHEDULES)
def test_sampling_from_noise_to_data(timesteps: str, noise_schedule: str) -> None:
    """64 steps of DPM++ 2M from t = 1 to the data, with all timesteps that the noise schedule allows."""
    diffusion = diffusion_of(noise_schedule)
    if (noise_schedule == "flow" and timesteps in ("karras", "exponential", "log_snr")) or (
        timesteps == "leading" and not diffusion.discrete
    ):
        with pytest.raises(ValueError, match=f"timesteps .*{timesteps}.*: choose trailing"):
            make_timesteps(diffusion, 8, timesteps)
        return
    ts = make_timesteps(diffusion, 64, timesteps)
    exact = DATA.flow(points(), diffusion, ts[0], ts[-1])
    z = sample("dpmpp_2m", DATA.denoiser(diffusion), diffusion, points(), ts)
    assert (z - exact).abs().max() < 0.06


@every_noise_schedule
@pytest.mark.parametrize("name", [name for name, (_, eta) in SAMPLERS.items() if eta is not None])
def test_added_noise_keeps_the_distribution(name: str, noise_schedule: str) -> None:
    """20,000 samples with eta 1 have the moments of the data."""
    diffusion, count = diffusion_of(noise_schedule), 20_000
    generator = torch.Generator().manual_seed(7)

    def noise_sampler(index: int) -> Tensor:
        return torch.randn(count, 1, generator=generator, dtype=torch.float64)

    z, ts = noise_sampler(0), make_timesteps(diffusion, 250)
    z = sample(name, DATA.denoiser(diffusion), diffusion, z, ts, eta=1.0, noise_sampler=noise_sampler)
    for order, tolerance in ((1, 0.03), (2, 0.05), (3, 0.05)):
        assert (z**order).mean().item() == pytest.approx(DATA.moment(order), abs=tolerance)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
@every_noise_schedule
def test_all_predictions_give_the_same_samples(noise_schedule: str, prediction: str) -> None:
    """A perfect network, whatever it predicts, leads every sampler to the same end."""
    if (noise_schedule, prediction) == ("flow", "epsilon"):
        pytest.skip("refused: epsilon is undefined at zero SNR")
    diffusion, z = diffusion_of(noise_schedule, prediction), points(count=5)
    ts = make_timesteps(diffusion, 9)
    for name in SAMPLERS:
        ends = [
            sample(name, denoiser, diffusion, z, ts, noise_sampler=lambda index: torch.full_like(z, 0.1 * index))
            for denoiser in (DATA.denoiser(diffusion), DATA.network_denoiser(diffusion))
        ]
        torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
@every_noise_schedule
def test_number_of_network_calls(noise_schedule: str, name: str) -> None:
    diffusion = diffusion_of(noise_schedule)
    timesteps = []

    def network(z: Tensor, timestep: Tensor) -> Tensor:
        timesteps.append(timestep[0].item())
        return torch.zeros_like(z)

    denoiser, ts = denoiser_of(network, diffusion), make_timesteps(diffusion, 7)
    sampler = get_sampler(name)
    steps = list(sampler(denoiser, diffusion, torch.randn(2, 1, 2, 2), ts, noise_sampler=lambda i: torch.zeros(1)))
    assert len(steps) == 7 and len(timesteps) == (13 if name in ("heun", "dpmpp_sde") else 7)
    for step in steps:
        assert step.z.isfinite().all() and step.z.dtype == step.denoised.dtype == torch.float32
    assert max(timesteps) <= 1000 + 96 and sorted(timesteps, reverse=True) == timesteps  # 250 ln 80 for EDM


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("noise_schedule", ["scaled_linear", "cosine"])
def test_zero_terminal_snr(noise_schedule: str, name: str) -> None:
    """From t = 1 without any signal: all stay finite, and those without noise end in the data."""
    diffusion, z = diffusion_of(noise_schedule, zero_terminal_snr=True), points()
    exact = DATA.flow(z, diffusion, double(1.0), double(0.0))
    ts, noise_sampler = make_timesteps(diffusion, 200, "linspace"), torch.zeros_like(z).mul
    end = sample(name, DATA.denoiser(diffusion), diffusion, z, ts, eta=eta_0(name), noise_sampler=noise_sampler)
    assert end.isfinite().all()
    if name != "lcm":
        assert (end - exact).abs().max() < 0.12


@every_noise_schedule
def test_inversion_undoes_euler(noise_schedule: str) -> None:
    """Down with euler and up again: the error falls with the steps, as the order of both says."""
    diffusion, z = diffusion_of(noise_schedule), points()
    denoiser, errors = DATA.denoiser(diffusion), []
    for steps in (50, 200, 800):
        ts = make_timesteps(diffusion, steps, "linspace")
        x0 = sample("euler", denoiser, diffusion, z, ts)
        errors.append((final_latents(ddim_invert(denoiser, diffusion, x0, ts)) - z).abs().max().item())
    assert errors[0] < 0.4 and errors[2] < 0.04 and errors[0] > 2 * errors[1] > 4 * errors[2], errors


def test_inversion_starts_with_the_noise_that_a_least_t_needs() -> None:
    """Without it almost none would arrive at t = 1."""
    diffusion = Diffusion(DiffusionConfig(noise_schedule="flow", prediction="x0", t_min=0.3))
    generator = torch.Generator().manual_seed(0)
    noise, start = torch.randn(2, 500, 1, generator=generator, dtype=torch.float64)
    denoiser, ts = DATA.denoiser(diffusion), make_timesteps(diffusion, 100)
    x0 = sample("euler", denoiser, diffusion, noise, ts)
    found, without = (final_latents(ddim_invert(denoiser, diffusion, x0, ts, add)) for add in (start, None))
    assert 0.85 < found.std() < 1.15 and without.std() < 0.8
    again = sample("euler", denoiser, diffusion, found, ts)
    assert (again - x0).abs().median() < 0.3  # the mean of what the noise at t_min hides


def test_ddpm_and_euler_ancestral_are_ddim_with_eta_1() -> None:
    diffusion, z = diffusion_of("cosine"), torch.randn(6, 1, dtype=torch.float64)
    denoiser, ts = DATA.denoiser(diffusion), make_timesteps(diffusion, 9)

    def end(name: str, eta: float | None = None) -> Tensor:
        noise_sampler = lambda index: torch.full((6, 1), 0.1 * index, dtype=torch.float64)  # noqa: E731
        return sample(name, denoiser, diffusion, z, ts, eta=eta, noise_sampler=noise_sampler)

    torch.testing.assert_close(end("euler"), end("ddim"))
    torch.testing.assert_close(end("ddpm"), end("ddim", 1.0))
    torch.testing.assert_close(end("euler_ancestral"), end("ddim", 1.0))
    assert (end("ddim") - end("ddim", 1.0)).abs().max() > 1e-2


def test_ddpm_step_is_the_posterior_of_ho_et_al() -> None:
    """Equation 7: mean and variance of q(x_{t-1} | x_t, x_0), for neighbouring steps of the linear schedule."""
    diffusion = Diffusion(DiffusionConfig(noise_schedule="linear"))
    t, s = double(0.5), double(0.499)
    bar_t, bar_s = diffusion.alpha(t) ** 2, diffusion.alpha(s) ** 2
    beta = 1 - bar_t / bar_s
    z, x0 = double(0.8)[:, None], double(-0.3)[:, None]
    mean = (bar_s.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - bar_s) * z) / (1 - bar_t)
    std = (beta * (1 - bar_s) / (1 - bar_t)).sqrt()
    for noise in (double(0.0)[:, None], double(1.0)[:, None]):
        noise_sampler = lambda index, noise=noise: noise  # noqa: E731
        end = sample("ddpm", lambda *_: x0, diffusion, z, torch.cat([t, s]), noise_sampler=noise_sampler)
        torch.testing.assert_close(end, mean + noise * std)


def test_the_edm_schedule_with_v_is_edm_preconditioning() -> None:
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1, where the data's standard deviation is 1."""
    diffusion = diffusion_of("edm")
    sigma = double(0.002, 0.3, 1.0, 7.0, 80.0)
    t = diffusion.t_from_noise_to_signal(sigma)
    torch.testing.assert_close(diffusion.noise_to_signal(t), sigma)
    x0, noise, output = torch.randn(3, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c_in, c_skip, c_out = (sigma**2 + 1).rsqrt(), 1 / (sigma**2 + 1), sigma * (sigma**2 + 1).rsqrt()
    x = x0 + sigma[:, None] * noise
    z = diffusion.add_noise(x0, noise, t)
    torch.testing.assert_close(z, c_in[:, None] * x)
    torch.testing.assert_close(diffusion.predict_x0(-output, z, t), c_skip[:, None] * x + c_out[:, None] * output)
    torch.testing.assert_close(diffusion.network_timestep(t), 1000 * sigma.log() / 4)


# Timesteps.


@every_noise_schedule
@given(st.integers(1, 50), st.sampled_from(["trailing", "linspace", "beta"]))
@settings(max_examples=20)
def test_timesteps_fall_from_1_to_0(noise_schedule: str, steps: int, timesteps: str) -> None:
    ts = make_timesteps(diffusion_of(noise_schedule), steps, timesteps)
    assert len(ts) == steps + 1 and ts[0] == 1 and ts[-1].abs() < 1e-12 and (ts.diff() < 0).all()


@pytest.mark.parametrize("timesteps", ["trailing", "linspace", "beta"])
def test_timesteps_end_at_the_least_t_that_was_trained(timesteps: str) -> None:
    diffusion = Diffusion(DiffusionConfig(noise_schedule="flow", prediction="x0", t_min=0.3))
    ts = make_timesteps(diffusion, 6, timesteps)
    assert len(ts) == 7 and ts[0] == 1 and ts[-2].item() == pytest.approx(0.3) and ts[-1] == 0 and (ts.diff() < 0).all()
    assert make_timesteps(diffusion, 1, timesteps).tolist() == [1, 0] and make_timesteps(diffusion, 1, [0.3])[0] == 0.3
    with pytest.raises(ValueError, match="timesteps must not be below t_min 0.3, where the model was not trained"):
        make_timesteps(diffusion, 2, [0.5, 0.2])


def test_timesteps_are_those_of_stable_diffusion() -> None:
    """The indices of 20 steps that diffusers and CompVis use."""
    diffusion = diffusion_of("scaled_linear", "epsilon")
    trailing, leading, linspace = (
        diffusion.network_timestep(make_timesteps(diffusion, 20, name)[:-1])
        for name in ("trailing", "leading", "linspace")
    )
    assert trailing.round().tolist() == list(range(999, 0, -50))
    assert leading.round().tolist() == list(range(951, 0, -50))
    assert linspace[:2].tolist() == pytest.approx([999, 946.42], abs=0.01) and linspace[-1] < 1e-9
    roots = diffusion.noise_to_signal(make_timesteps(diffusion, 20, "karras")[:-1]) ** (1 / 7)
    assert roots.diff().std().item() < 1e-9
    assert diffusion.noise_to_signal(make_timesteps(diffusion, 20, "log_snr")[:-1]).log().diff().std().item() < 1e-9


def test_leading_timesteps_fall_for_any_number_of_steps() -> None:
    for steps in (1, 334, 500, 999):
        assert (make_timesteps(diffusion_of("linear"), steps, "leading").diff() < 0).all()


def test_beta_timesteps_are_the_quantiles_of_the_distribution() -> None:
    torch.manual_seed(0)
    samples = torch.distributions.Beta(double(0.6), double(0.6)).sample((200_000,)).flatten()
    want = samples.quantile(torch.linspace(1, 0, 11, dtype=torch.float64))
    torch.testing.assert_close(make_timesteps(diffusion_of("flow"), 10, "beta"), want, rtol=0, atol=5e-3)


def test_resolution_shift_adds_noise_earlier() -> None:
    """Esser et al. 2024, equation 23: t = 0.5 becomes 3 / 4 with shift 3; the inverse undoes it."""
    diffusion = diffusion_of("flow", "flow", shift=3)
    assert diffusion.sigma(double(0.5)).item() == pytest.approx(0.75)
    assert diffusion.network_timestep(double(0.5)).item() == pytest.approx(750)
    t = torch.linspace(0, 0.99, 12, dtype=torch.float64)
    torch.testing.assert_close(diffusion.t_from_noise_to_signal(diffusion.noise_to_signal(t)), t)


def test_timesteps_as_a_list() -> None:
    diffusion = diffusion_of("flow")
    assert make_timesteps(diffusion, 3, (1.0, 0.6, 0.1)).tolist() == [1.0, 0.6, 0.1, 0.0]
    with pytest.raises(ValueError, match="expected 4 timesteps.*got 3"):
        make_timesteps(diffusion, 4, (1.0, 0.6, 0.1))
    for bad in ((0.5, 0.6), (1.2, 0.1), (0.5, 0.0)):
        with pytest.raises(ValueError, match=r"timesteps must fall.*\(0, 1\]"):
            make_timesteps(diffusion, 2, bad)


@pytest.mark.parametrize(
    ("diffusion", "steps", "timesteps", "message"),
    [
        (diffusion_of("flow"), 0, "trailing", "steps.*at least 1, not 0"),
        (diffusion_of("flow"), 4, "sgm", "timesteps 'sgm'.*choose one of trailing, leading"),
        (diffusion_of("flow"), 4, "karras", "timesteps karras.*infinite at t = 1.*choose trailing"),
        (diffusion_of("flow"), 4, "leading", "timesteps leading.*noise_schedule flow.*choose trailing"),
        (diffusion_of("linear"), 1000, "leading", "timesteps leading.*at most 999 steps, not 1000.*choose trailing"),
        (diffusion_of("linear", zero_terminal_snr=True), 4, "leading", "leading.*zero terminal SNR.*choose trailing"),
    ],
)
def test_timesteps_that_are_refused(diffusion: Diffusion, steps: int, timesteps: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_timesteps(diffusion, steps, timesteps)


@pytest.mark.parametrize(
    ("name", "eta", "message"),
    [
        ("plms", None, "sampler 'plms'.*choose one of ddpm, ddim, euler"),
        ("unipc", 0.5, "sampler unipc has no eta: leave it out"),
        ("ddim", 2.0, "eta must be between 0 and 1, not 2"),
    ],
)
def test_samplers_that_are_refused(name: str, eta: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_sampler(name, eta)


# Against diffusers.

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
SCHEDULERS: dict[str, tuple[str, dict[str, object]]] = {
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
    "lcm": ("LCMScheduler", {"set_alpha_to_one": True}),  # timesteps of its own, and a skip of less than 1e-5 from z
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", SCHEDULERS)
def test_samplers_agree_with_diffusers(
    case: str, prediction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same betas, timesteps, noise and network outputs give the same samples to 1e-5 of the largest value.

    Their schedules are float32 numbers whatever the samples are, so float64 comes no nearer.
    """
    diffusers = pytest.importorskip("diffusers")
    cls, settings = SCHEDULERS[case]
    name, _, eta = case.partition(" eta ")
    scheduler = getattr(diffusers, cls)(**SD, prediction_type=prediction, **settings)
    diffusion = Diffusion(DiffusionConfig(prediction="epsilon" if prediction == "epsilon" else "v"))

    def network(z: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(z) * 0.7 + (timestep / 1000).view(-1, 1, 1, 1) * 0.1

    noises = torch.randn(21, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    draws = iter(noises[1:])
    module = f"diffusers.schedulers.{scheduler.__module__.split('.')[-1]}.randn_tensor"
    monkeypatch.setattr(module, lambda *args, **kwargs: next(draws), raising=False)
    scheduler.set_timesteps(20)
    in_sigma = name.startswith("euler")  # theirs hold z / alpha there
    theirs = noises[0] / diffusion.alpha(torch.tensor(1.0)) if in_sigma else noises[0]
    extra = {"eta": float(eta)} if eta else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(network(scaled, t.expand(2).float()), t, theirs, return_dict=False, **extra)[0]
    own_timesteps = ((scheduler.timesteps + 1) / 1000).double().tolist()
    ts = make_timesteps(diffusion, 20, own_timesteps if name == "lcm" else "trailing")
    ours = sample(
        name,
        denoiser_of(network, diffusion),
        diffusion,
        noises[0],
        ts,
        eta=float(eta) if eta else None,
        noise_sampler=lambda index: noises[1 + index],
    )
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_heun_differs_from_diffusers_by_its_mean_alone() -> None:
    """Theirs averages the predicted noise, ours the predicted x0: half the step, a quarter of the difference."""
    diffusers = pytest.importorskip("diffusers")
    diffusion = diffusion_of("scaled_linear", "epsilon")
    network = lambda z, timestep: torch.tanh(z) * 0.7  # noqa: E731
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    differences = []
    for steps in (40, 80, 160):
        scheduler = diffusers.HeunDiscreteScheduler(**SD)
        scheduler.set_timesteps(steps)
        theirs = start / diffusion.alpha(torch.tensor(1.0))
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(theirs, t)
            theirs = scheduler.step(network(scaled, t), t, theirs, return_dict=False)[0]
        ours = sample("heun", denoiser_of(network, diffusion), diffusion, start, make_timesteps(diffusion, steps))
        differences.append((ours - theirs).abs().max().item())
    rates = [math.log2(a / b) for a, b in itertools.pairwise(differences)]
    assert min(rates) > 1.2, f"differences {differences}"


def test_flow_euler_with_shift_agrees_with_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    diffusion = diffusion_of("flow", "flow", shift=3)
    network = lambda z, timestep: torch.tanh(z) + timestep.view(-1, 1) / 1000  # noqa: E731
    start = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    theirs = start
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, t.expand(4)), t, theirs, return_dict=False)[0]
    ours = sample("euler", denoiser_of(network, diffusion), diffusion, start, make_timesteps(diffusion, 10))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
