"""The mathematics of diffusion, against closed forms and published numbers."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretend_mps import OnMPS, pretend_mps
from torch import Tensor

from ldm.diffusion.process import Diffusion, DiffusionConfig


def diffusion_of(noise_schedule: str = "scaled_linear", **values: object) -> Diffusion:
    return Diffusion(DiffusionConfig.from_dict({"noise_schedule": noise_schedule, **values}, source="test"))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


VALID = [
    {"noise_schedule": noise_schedule, "prediction": prediction, "zero_terminal_snr": zero}
    for noise_schedule in ("linear", "scaled_linear", "cosine", "flow")
    for prediction in ("epsilon", "v", "x0", "flow")
    for zero in (False, True)
    if not (noise_schedule == "flow" and (zero or prediction == "epsilon")) and not (zero and prediction == "epsilon")
]
NAMES = [f"{c['noise_schedule']}-{c['prediction']}{'-zero' if c['zero_terminal_snr'] else ''}" for c in VALID]


@pytest.mark.parametrize("values", VALID, ids=NAMES)
def test_predict_x0_inverts_training_target(values: dict[str, object]) -> None:
    diffusion = Diffusion(DiffusionConfig.from_dict(values, source="test"))
    x0, noise = randn(2, 5, 3, 4, 4)
    for t in (double(*[0.001] * 5), double(0.1, 0.3, 0.5, 0.7, 0.9), double(*[1.0] * 5)):
        z_t, target = diffusion.add_noise(x0, noise, t), diffusion.training_target(x0, noise, t)
        torch.testing.assert_close(diffusion.predict_x0(target, z_t, t), x0, rtol=0, atol=1e-7)


def test_scaled_linear_is_stable_diffusions_schedule() -> None:
    diffusion = diffusion_of()
    first, last = double(1 / 1000), double(1.0)
    assert diffusion.alpha(first).item() ** 2 == pytest.approx(0.99915, abs=1e-9)
    assert diffusion.alpha(last).item() ** 2 == pytest.approx(0.0046600985, abs=1e-9)
    assert diffusion.noise_to_signal(first).item() == pytest.approx(0.0291672, abs=1e-6)
    assert diffusion.noise_to_signal(last).item() == pytest.approx(14.6146412, abs=1e-5)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step() -> None:
    diffusion = diffusion_of(prediction="v", zero_terminal_snr=True)
    assert diffusion.alpha(double(1.0)).item() == 0
    assert diffusion.alpha(double(0.999)).item() ** 2 == pytest.approx(1.968e-7, rel=1e-3)
    assert diffusion.alpha(double(0.001)).item() ** 2 == pytest.approx(0.99915, abs=1e-9)


@pytest.mark.parametrize("noise_schedule", ["linear", "scaled_linear", "cosine", "flow"])
def test_schedules_start_at_data_and_lose_signal_monotonically(noise_schedule: str) -> None:
    diffusion = diffusion_of(noise_schedule, prediction="v")
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert diffusion.alpha(t[0]).item() == 1 and diffusion.sigma(t[0]).item() == 0
    assert (diffusion.alpha(t).diff() < 0).all() and (diffusion.sigma(t).diff() > -1e-12).all()
    if noise_schedule != "flow":
        torch.testing.assert_close(diffusion.alpha(t) ** 2 + diffusion.sigma(t) ** 2, torch.ones_like(t))


def test_float32_t_gives_the_same_alpha_as_float64() -> None:
    diffusion, t = diffusion_of(), torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(diffusion.alpha(t.float()).double(), diffusion.alpha(t), rtol=0, atol=1e-7)


def test_network_timesteps() -> None:
    """Discrete ones are the indices of the betas; flow has 1000 sigma."""
    t = torch.linspace(1, 0.05, 20, dtype=torch.float64)
    assert diffusion_of().network_timestep(t).round().long().tolist() == list(range(999, 0, -50))
    assert diffusion_of("flow", prediction="flow").network_timestep(double(0.5)).item() == 500


def assert_weighs_x0(diffusion: Diffusion, t: Tensor, x0_weight: Callable[[Tensor], Tensor]) -> None:
    """Loss weight x squared error of the target equals `x0_weight` of the SNR x squared error of x0."""
    x0, noise, prediction = randn(3, len(t), 1, 2, 2)
    z_t, target = diffusion.add_noise(x0, noise, t), diffusion.training_target(x0, noise, t)
    x0_error = (diffusion.predict_x0(prediction, z_t, t) - x0).square().flatten(1).mean(1)
    target_error = (prediction - target).square().flatten(1).mean(1)
    snr = (diffusion.alpha(t) / diffusion.sigma(t)) ** 2
    torch.testing.assert_close(diffusion.loss_weight(t) * target_error, x0_weight(snr) * x0_error)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
@pytest.mark.parametrize("noise_schedule", ["cosine", "flow"])
@pytest.mark.parametrize(("floor", "gamma"), [(None, 5.0), (1.0, None), (1.0, 5.0)])
def test_min_snr_is_the_same_objective_for_every_prediction(
    noise_schedule: str, prediction: str, floor: float | None, gamma: float | None
) -> None:
    diffusion = diffusion_of(
        noise_schedule, prediction=prediction, loss_weighting="min_snr", gamma=gamma, snr_floor=floor
    )
    assert_weighs_x0(diffusion, double(0.05, 0.2, 0.5, 0.8, 0.95), lambda snr: snr.clamp(floor, gamma))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
@pytest.mark.parametrize(
    ("loss_weighting", "x0_weight"),
    [("soft_min_snr", lambda snr: 5 * snr / (snr + 5)), ("p2", lambda snr: snr * (1 + snr) ** -5)],
)
def test_soft_min_snr_and_p2_are_the_same_objective_for_every_prediction(
    prediction: str, loss_weighting: str, x0_weight: Callable[[Tensor], Tensor]
) -> None:
    """Crowson et al. 2024: SNR g / (SNR + g) of x0's error; Choi et al. 2022: (1 + SNR)^-g of the noise's."""
    diffusion = diffusion_of("cosine", prediction=prediction, loss_weighting=loss_weighting, gamma=5)
    assert_weighs_x0(diffusion, double(0.05, 0.5, 0.95), x0_weight)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_min_snr_is_finite_at_zero_snr(prediction: str) -> None:
    diffusion = diffusion_of(
        prediction=prediction, zero_terminal_snr=True, loss_weighting="min_snr", gamma=5, snr_floor=1
    )
    assert diffusion.loss_weight(double(0.0, 0.001, 1.0)).isfinite().all()


def test_edm_samples_sigma_log_normally() -> None:
    diffusion = diffusion_of("edm", prediction="v", t_distribution="log_normal", log_normal_mean_std=(-1.0, 0.8))
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = diffusion.noise_to_signal(diffusion.sample_t(uniform, torch.arange(50_000), 50_000)).log()
    assert sigma.mean().item() == pytest.approx(-1.0, abs=0.02) and sigma.std().item() == pytest.approx(0.8, abs=0.02)


@given(st.floats(0, 1, exclude_max=True, width=32), st.sampled_from(["uniform", "stratified", "logit_normal"]))
def test_sampled_t_is_within_the_schedule(uniform: float, t_distribution: str) -> None:
    for noise_schedule in ("cosine", "flow"):
        diffusion = diffusion_of(noise_schedule, prediction="v", t_distribution=t_distribution)
        t = diffusion.sample_t(torch.full((4,), uniform), torch.arange(4), 4)
        assert ((t > 0) & (t <= 1)).all()
        if noise_schedule == "cosine":
            assert torch.equal((t * 1000).round() / 1000, t)


def test_stratified_t_covers_every_part_of_the_schedule() -> None:
    diffusion = diffusion_of("flow", prediction="flow", t_distribution="stratified")
    t = diffusion.sample_t(torch.rand(64, generator=torch.Generator().manual_seed(0)), torch.arange(64), 64)
    assert torch.equal((t * 64).floor(), torch.arange(64.0))


@pytest.mark.parametrize("t_distribution", ["uniform", "stratified", "logit_normal"])
def test_t_min_leaves_the_least_noise_out(t_distribution: str) -> None:
    """And stretches what is left: as without it, between t_min and 1."""
    uniform, positions = torch.rand(64, generator=torch.Generator().manual_seed(1)), torch.arange(64)
    whole, rest = (
        diffusion_of("flow", prediction="x0", t_distribution=t_distribution, t_min=t_min).sample_t(
            uniform, positions, 64
        )
        for t_min in (0, 0.25)
    )
    torch.testing.assert_close(rest, 0.25 + 0.75 * whole)


def test_logit_normal_t_has_the_right_distribution() -> None:
    diffusion = diffusion_of("flow", prediction="flow", t_distribution="logit_normal")
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    t = diffusion.sample_t(uniform, torch.arange(50_000), 50_000)
    logit = torch.log(t / (1 - t))
    assert logit.mean().item() == pytest.approx(0, abs=0.02) and logit.std().item() == pytest.approx(1, abs=0.02)


def test_schedules_agree_with_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    betas = {"linear": ("linear", 1e-4, 0.02), "scaled_linear": ("scaled_linear", 0.00085, 0.012)}
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    for noise_schedule, (schedule, start, end) in betas.items():
        theirs = diffusers.DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end).alphas_cumprod.double()
        torch.testing.assert_close(diffusion_of(noise_schedule).alpha(t) ** 2, theirs, rtol=1e-5, atol=4.8e-7)


FLOW, EDM = {"noise_schedule": "flow"}, {"noise_schedule": "edm", "prediction": "v"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (FLOW | {"prediction": "v", "zero_terminal_snr": True}, "zero_terminal_snr.*flow.*leave it off"),
        (EDM | {"t_distribution": "log_normal", "zero_terminal_snr": True}, "zero_terminal_snr.*edm.*leave it off"),
        ({"shift": 3}, "shift 3.*flow, not scaled_linear"),
        ({"t_min": 0.3}, "t_min 0.3.*flow, not scaled_linear"),
        (EDM, "log_normal.*edm.*choose both or neither"),
        (FLOW | {"prediction": "epsilon"}, "epsilon.*zero SNR.*choose v, x0 or flow"),
        ({"zero_terminal_snr": True}, "epsilon.*zero SNR.*choose v, x0 or flow"),
        ({"gamma": 5}, "gamma.*snr_floor.*choose min_snr, soft_min_snr or p2"),
        ({"loss_weighting": "p2", "gamma": 1, "snr_floor": 1}, "snr_floor.*min_snr, not p2"),
        ({"loss_weighting": "min_snr"}, "loss_weighting min_snr needs gamma"),
        ({"loss_weighting": "min_snr", "snr_floor": 6, "gamma": 5}, "snr_floor 6 is above gamma 5: lower it"),
    ],
)
def test_configurations_that_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig.from_dict(values, source="test")


@pytest.mark.parametrize("noise_schedule", ["linear", "scaled_linear", "cosine", "flow", "edm"])
def test_a_device_without_float64_has_the_same_numbers(noise_schedule: str) -> None:
    """As Apple's GPUs."""
    log_normal = noise_schedule == "edm"
    settings = {"t_distribution": "log_normal" if log_normal else "uniform", "prediction": "v"}
    diffusion = diffusion_of(noise_schedule, **settings)
    uniform, z, noise = torch.tensor([0.1, 0.5, 0.9]), randn(3, 4).float(), randn(3, 4).float() + 1

    def numbers(device: str) -> list[Tensor]:
        u, x, n = (tensor.to(device) for tensor in (uniform, z, noise))
        t = diffusion.sample_t(u, torch.arange(3).to(device), 3)
        z_t = diffusion.add_noise(x, n, t)
        target = diffusion.training_target(x, n, t)
        x0 = diffusion.predict_x0(target, z_t, t)
        return [t, z_t, target, x0, diffusion.network_timestep(t), diffusion.loss_weight(t)]

    want = numbers("cpu")
    with pretend_mps():
        found = numbers("mps")
        assert all(isinstance(tensor, OnMPS) for tensor in found)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, want, strict=True))
