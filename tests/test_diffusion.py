"""The mathematics of diffusion, against closed forms and published numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.config import Config
from ldm.diffusion.process import Diffusion, DiffusionConfig

VALID = [
    DiffusionConfig(
        noise_schedule=path,  # type: ignore[arg-type]
        prediction=prediction,  # type: ignore[arg-type]
        zero_terminal_snr=zero,
        t_distribution="log_normal" if path == "edm" else "uniform",
    )
    for path in ("linear", "scaled_linear", "cosine", "flow")
    for prediction in ("epsilon", "v", "x0", "flow")
    for zero in (False, True)
    if not (path == "flow" and (zero or prediction == "epsilon")) and not (zero and prediction == "epsilon")
]
NAMES = [f"{c.noise_schedule}-{c.prediction}{'-zero' if c.zero_terminal_snr else ''}" for c in VALID]
every_process = pytest.mark.parametrize("config", VALID, ids=NAMES)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gaussian_denoiser(process: Diffusion, mean: float, std: float):  # type: ignore[no-untyped-def]
    """The exact denoiser of data from N(mean, std^2)."""

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)

    return denoise


@every_process
def test_to_data_inverts_target(config: Config) -> None:
    process = Diffusion(config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    for t in (double(*[0.001] * 5), double(0.1, 0.3, 0.5, 0.7, 0.9), double(*[1.0] * 5)):
        z_t = process.add_noise(z, noise, t)
        torch.testing.assert_close(
            process.predict_x0(process.training_target(z, noise, t), z_t, t), z, rtol=0, atol=1e-7
        )


def test_scaled_linear_is_stable_diffusions_schedule() -> None:
    process = Diffusion(DiffusionConfig())
    first, last = double(1 / 1000), double(1.0)
    assert process.alpha(first).item() ** 2 == pytest.approx(0.99915, abs=1e-9)
    assert process.alpha(last).item() ** 2 == pytest.approx(0.0046600985, abs=1e-9)
    assert (process.sigma(first) / process.alpha(first)).item() == pytest.approx(0.0291672, abs=1e-6)
    assert (process.sigma(last) / process.alpha(last)).item() == pytest.approx(14.6146412, abs=1e-5)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step() -> None:
    process = Diffusion(DiffusionConfig(prediction="v", zero_terminal_snr=True))
    assert process.alpha(double(1.0)).item() == 0
    assert process.alpha(double(0.999)).item() ** 2 == pytest.approx(1.968e-7, rel=1e-3)
    assert process.alpha(double(0.001)).item() ** 2 == pytest.approx(0.99915, abs=1e-9)


@pytest.mark.parametrize("path", ["linear", "scaled_linear", "cosine", "flow"])
def test_paths_start_at_data_and_lose_signal_monotonically(path: str) -> None:
    process = Diffusion(DiffusionConfig(noise_schedule=path, prediction="v"))  # type: ignore[arg-type]
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert process.alpha(t[0]).item() == 1 and process.sigma(t[0]).item() == 0
    assert (process.alpha(t).diff() < 0).all() and (process.sigma(t).diff() > -1e-12).all()
    if path != "flow":
        torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))


def test_float32_times_hit_the_same_grid_points_as_float64() -> None:
    process = Diffusion(DiffusionConfig())
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(process.alpha(t.float()).double(), process.alpha(t), rtol=0, atol=1e-7)


def test_discrete_timesteps_are_the_indices_of_the_betas() -> None:
    grid = torch.linspace(1, 0.05, 20, dtype=torch.float64)
    steps = Diffusion(DiffusionConfig()).network_timestep(grid).round().long().tolist()
    assert steps == list(range(999, 0, -50))
    assert (
        Diffusion(DiffusionConfig(noise_schedule="flow", prediction="flow")).network_timestep(double(0.5)).item() == 500
    )


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
@pytest.mark.parametrize("path", ["cosine", "flow"])
@pytest.mark.parametrize(("floor", "gamma"), [(None, 5.0), (1.0, None), (1.0, 5.0)])
def test_clamped_snr_is_the_same_objective_for_every_prediction(
    path: str, prediction: str, floor: float | None, gamma: float | None
) -> None:
    """Weight x squared error of the target equals clamped SNR x squared error of the data."""
    config = DiffusionConfig(
        noise_schedule=path, prediction=prediction, loss_weighting="min_snr", gamma=gamma, snr_floor=floor
    )  # type: ignore[arg-type]
    process = Diffusion(config)
    t = double(0.05, 0.2, 0.5, 0.8, 0.95)
    generator = torch.Generator().manual_seed(0)
    z, noise, guess = torch.randn(3, 5, 1, 2, 2, generator=generator, dtype=torch.float64)
    z_t, target = process.add_noise(z, noise, t), process.training_target(z, noise, t)
    error_in_data = (process.predict_x0(guess, z_t, t) - z).square().flatten(1).mean(1)
    error_in_target = (guess - target).square().flatten(1).mean(1)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    torch.testing.assert_close(process.loss_weight(t) * error_in_target, snr.clamp(floor, gamma) * error_in_data)


def test_clamped_snr_is_finite_where_the_signal_is_zero() -> None:
    for prediction in ("v", "x0", "flow"):
        config = DiffusionConfig(
            prediction=prediction, zero_terminal_snr=True, loss_weighting="min_snr", gamma=5, snr_floor=1
        )  # type: ignore[arg-type]
        assert Diffusion(config).loss_weight(double(0.0, 0.001, 1.0)).isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_soft_min_snr_and_p2_are_the_same_objective_for_every_prediction(prediction: str) -> None:
    """Crowson et al. 2024: SNR g / (SNR + g) of the data's error; Choi et al. 2022: (1 + SNR)^-g of the noise's."""
    t = double(0.05, 0.5, 0.95)
    generator = torch.Generator().manual_seed(0)
    z, noise, guess = torch.randn(3, 3, 1, 2, 2, generator=generator, dtype=torch.float64)
    for weighting, of_data in {
        "soft_min_snr": lambda snr: 5 * snr / (snr + 5),
        "p2": lambda snr: snr * (1 + snr) ** -5,
    }.items():
        values = {"noise_schedule": "cosine", "prediction": prediction, "loss_weighting": weighting, "gamma": 5}
        process = Diffusion(DiffusionConfig.from_dict(values, source="test"))
        z_t, target = process.add_noise(z, noise, t), process.training_target(z, noise, t)
        error_in_data = (process.predict_x0(guess, z_t, t) - z).square().flatten(1).mean(1)
        error_in_target = (guess - target).square().flatten(1).mean(1)
        snr = (process.alpha(t) / process.sigma(t)) ** 2
        torch.testing.assert_close(process.loss_weight(t) * error_in_target, of_data(snr) * error_in_data)


def test_edm_draws_its_noise_log_normally() -> None:
    process = Diffusion(
        DiffusionConfig(
            noise_schedule="edm", prediction="v", t_distribution="log_normal", log_normal_mean_std=(-1.0, 0.8)
        )
    )
    u = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = process.noise_to_signal(process.sample_t(u, torch.arange(50_000), 50_000)).log()
    assert sigma.mean().item() == pytest.approx(-1.0, abs=0.02) and sigma.std().item() == pytest.approx(0.8, abs=0.02)


def test_snr_floor_above_its_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="snr_floor 6 is above gamma 5"):
        DiffusionConfig(loss_weighting="min_snr", snr_floor=6, gamma=5)


@pytest.mark.parametrize("path", ["flow", "linear"])
def test_epsilon_without_signal_is_refused_with_the_reason(path: str) -> None:
    with pytest.raises(ValueError, match="epsilon says nothing about the data where the signal is zero"):
        DiffusionConfig(noise_schedule=path, prediction="epsilon", zero_terminal_snr=path == "linear")  # type: ignore[arg-type]


@given(st.floats(0, 1, exclude_max=True, width=32), st.sampled_from(["uniform", "stratified", "logit_normal"]))
def test_drawn_times_are_inside_the_path(u: float, kind: str) -> None:
    for path in ("cosine", "flow"):
        process = Diffusion(DiffusionConfig(noise_schedule=path, prediction="v", t_distribution=kind))  # type: ignore[arg-type]
        t = process.sample_t(torch.full((4,), u), torch.arange(4), 4)
        assert ((t > 0) & (t <= 1)).all()
        if path == "cosine":
            assert torch.equal((t * 1000).round() / 1000, t)


def test_stratified_times_cover_every_part_of_the_path() -> None:
    process = Diffusion(DiffusionConfig(noise_schedule="flow", prediction="flow", t_distribution="stratified"))
    t = process.sample_t(torch.rand(64, generator=torch.Generator().manual_seed(0)), torch.arange(64), 64)
    assert torch.equal((t * 64).floor(), torch.arange(64.0))


def test_logit_normal_times_have_the_right_distribution() -> None:
    process = Diffusion(DiffusionConfig(noise_schedule="flow", prediction="flow", t_distribution="logit_normal"))
    t = process.sample_t(torch.rand(50_000, generator=torch.Generator().manual_seed(0)), torch.arange(50_000), 50_000)
    logit = torch.log(t / (1 - t))
    assert logit.mean().item() == pytest.approx(0, abs=0.02) and logit.std().item() == pytest.approx(1, abs=0.02)


def test_schedules_agree_with_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    names = {"linear": ("linear", 1e-4, 0.02), "scaled_linear": ("scaled_linear", 0.00085, 0.012)}
    grid = torch.arange(1, 1001, dtype=torch.float64) / 1000
    for path, (schedule, start, end) in names.items():
        theirs = diffusers.DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end).alphas_cumprod.double()
        ours = Diffusion(DiffusionConfig(noise_schedule=path)).alpha(grid) ** 2  # type: ignore[arg-type]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=4.8e-7)
