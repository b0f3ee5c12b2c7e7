"""Samplers: each is a generator of steps from noise to x0 over a Denoiser; the caller owns the loop.

All are written in alpha and sigma, float64 on the CPU, so they run on every noise schedule. `_step` solves the ODE or
SDE exactly for a constant x0; samplers differ in the x0 that they plug in and in the noise that they add.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoiser
from ldm.diffusion.process import Diffusion

NoiseSampler = Callable[[int], Tensor]
"""Index of the draw, from 0 -> standard normal noise (b, ...), shaped as the latents."""


class SamplerStep(NamedTuple):
    """The state of a sampler after a step; both are (b, ...)."""

    z: Tensor  # the latents at the new, lower t; the result after the last step
    denoised: Tensor  # the newest prediction of x0


class Sampler(Protocol):
    """All samplers, with eta bound: from `z` (b, ...) at ts[0]; `ts` (steps + 1,) falls to 0, float64 on the CPU."""

    def __call__(
        self, denoiser: Denoiser, diffusion: Diffusion, z: Tensor, ts: Tensor, *, noise_sampler: NoiseSampler
    ) -> Iterator[SamplerStep]: ...


# The step that all samplers share.


def _step(
    diffusion: Diffusion, z: Tensor, x0: Tensor, t: Tensor, s: Tensor, *, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """From t down to s, exact where x0 is constant (Lu et al. 2022, equations 9 and 18 at order 1).

    z_s = sigma_s / sigma_t e^(-eta h) z_t + alpha_s (1 - e^(-(1 + eta) h)) x0 + sigma_s sqrt(1 - e^(-2 eta h)) noise,
    with h = lambda_s - lambda_t and lambda = log(alpha / sigma). Eta 0 is the ODE, eta 1 the SDE.
    """
    exp_neg_h, sigma = _exp_neg_h(diffusion, t, s), diffusion.sigma(s)
    z = sigma / diffusion.sigma(t) * exp_neg_h**eta * z + diffusion.alpha(s) * (1 - exp_neg_h ** (1 + eta)) * x0
    return z if noise is None else z + sigma * (1 - exp_neg_h ** (2 * eta)).sqrt() * noise


def _exp_neg_h(diffusion: Diffusion, t: Tensor, s: Tensor) -> Tensor:
    """e^(-h), the ratio of sigma / alpha at s to that at t, in [0, 1); finite where lambda is not."""
    return (diffusion.sigma(s) / diffusion.alpha(s)) * (diffusion.alpha(t) / diffusion.sigma(t))


def _log_snr(diffusion: Diffusion, t: Tensor) -> Tensor:
    """lambda(t) = log(alpha / sigma), half the logarithm of the SNR; infinite at the ends of some schedules."""
    return diffusion.alpha(t).log() - diffusion.sigma(t).log()


# Samplers.


def ddim(
    denoiser: Denoiser, diffusion: Diffusion, z: Tensor, ts: Tensor, *, eta: float, noise_sampler: NoiseSampler
) -> Iterator[SamplerStep]:
    """DDIM (Song et al. 2021, equation 12): eta 0 is deterministic, eta 1 has DDPM's variance. One call a step.

    With eta 1 it is ancestral sampling: DDPM (Ho et al. 2020, equation 7), and also what is called Euler ancestral.
    """
    for i, (t, s) in enumerate(itertools.pairwise(ts)):
        denoised = denoiser(z, t.expand(len(z)))
        epsilon = (z - diffusion.alpha(t) * denoised) / diffusion.sigma(t)
        sigma = diffusion.sigma(s)
        sigma_up = eta * sigma * (1 - _exp_neg_h(diffusion, t, s) ** 2).sqrt()
        z = diffusion.alpha(s) * denoised + (sigma**2 - sigma_up**2).clamp_min(0).sqrt() * epsilon
        if eta and sigma > 0:
            z = z + sigma_up * noise_sampler(i)
        yield SamplerStep(z, denoised)


def euler(
    denoiser: Denoiser, diffusion: Diffusion, z: Tensor, ts: Tensor, *, noise_sampler: NoiseSampler
) -> Iterator[SamplerStep]:
    """Euler's method on d(z / sigma) = x0 d(alpha / sigma) (the ODE of Karras et al. 2022, equation 1, rewritten).

    It is the same step as DDIM with eta 0, and as Euler on d(z / alpha) = noise d(sigma / alpha). One call a step.
    """
    for t, s in itertools.pairwise(ts):
        denoised = denoiser(z, t.expand(len(z)))
        z = _step(diffusion, z, denoised, t, s)
        yield SamplerStep(z, denoised)


def heun(
    denoiser: Denoiser, diffusion: Diffusion, z: Tensor, ts: Tensor, *, eta: float, noise_sampler: NoiseSampler
) -> Iterator[SamplerStep]:
    """Heun's method on the same equation (Karras et al. 2022, algorithms 1 and 2). 2 N - 1 calls for N steps.

    Eta is the churn: each step first raises sigma / alpha by the factor 1 + eta (sqrt 2 - 1), EDM's largest at eta 1.
    The two predictions are averaged as x0, not as noise: that stays bounded where the signal vanishes.
    """
    for i, (t, s) in enumerate(itertools.pairwise(ts)):
        if eta and diffusion.alpha(t) > 0:
            z, t = _churn(diffusion, z, t, 1 + eta * (math.sqrt(2) - 1), noise_sampler(i))
        denoised = denoiser(z, t.expand(len(z)))
        if s > 0:
            denoised = (denoised + denoiser(_step(diffusion, z, denoised, t, s), s.expand(len(z)))) / 2
        z = _step(diffusion, z, denoised, t, s)
        yield SamplerStep(z, denoised)


def _churn(diffusion: Diffusion, z: Tensor, t: Tensor, factor: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Add noise until sigma / alpha is `factor` times as large, or t = 1 is reached: the new z and t."""
    t_up = diffusion.t_from_noise_to_signal(diffusion.noise_to_signal(t) * factor)
    scale = diffusion.alpha(t_up) / diffusion.alpha(t)
    sigma_up = (diffusion.sigma(t_up) ** 2 - (scale * diffusion.sigma(t)) ** 2).clamp_min(0).sqrt()
    return scale * z + sigma_up * noise, t_up


def dpmpp_2m(
    denoiser: Denoiser, diffusion: Diffusion, z: Tensor, ts: Tensor, *, eta: float, noise_sampler: NoiseSampler
) -> Iterator[SamplerStep]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order from the previous prediction. One call a step.

    Eta 1 is its SDE: the step of equation 18 there with x0 extrapolated to the midpoint.
    """
    old_denoised: Tensor | None = None
    h_last = torch.tensor(0.0)
    for i, (t, s) in enumerate(itertools.pairwise(ts)):
        denoised = denoiser(z, t.expand(len(z)))
        h = _log_snr(diffusion, s) - _log_snr(diffusion, t)
        denoised_d = denoised
        if old_denoised is not None and diffusion.sigma(s) > 0:  # the last step to t = 0 is of first order
            denoised_d = denoised + (denoised - old_denoised) * (h / (2 * h_last))
        z = _step(diffusion, z, denoised_d, t, s, eta=eta, noise=noise_sampler(i) if eta else None)
        old_denoised, h_last = denoised, h
        yield SamplerStep(z, denoised)


def dpmpp_3m_sde(
    denoiser: Denoiser, diffusion: Diffusion, z: Tensor, ts: Tensor, *, eta: float, noise_sampler: NoiseSampler
) -> Iterator[SamplerStep]:
    """DPM-Solver++(3M) with noise: the parabola through the last three x0, integrated exactly. One call a step.

    Source: the multistep exponential integrator of Lu et al. 2022 (appendix B), for the SDE; eta 0 is the ODE.
    """
    history: list[Tensor] = []  # the last three `denoised`, newest last
    hs: list[Tensor] = []  # the last two h, between them
    for i, (t, s) in enumerate(itertools.pairwise(ts)):
        denoised = denoiser(z, t.expand(len(z)))
        history = [*history[-2:], denoised]
        h = _log_snr(diffusion, s) - _log_snr(diffusion, t)
        z = _step(diffusion, z, denoised, t, s, eta=eta, noise=noise_sampler(i) if eta else None)
        if len(history) > 1 and diffusion.sigma(s) > 0:
            d1, d2 = _divided_differences(history, hs, h)
            h_eta = h * (1 + eta)
            phi_2 = torch.expm1(-h_eta) / h_eta + 1
            z = z + diffusion.alpha(s) * (phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2)
        hs = [*hs[-1:], h]
        yield SamplerStep(z, denoised)


def _divided_differences(history: list[Tensor], hs: list[Tensor], h: Tensor) -> tuple[Tensor, Tensor | float]:
    """First and second differences of x0 by log-SNR at the newest, in units of h (parabola through the last three)."""
    r0 = hs[-1] / h
    d1 = (history[-1] - history[-2]) / r0
    if len(history) < 3:
        return d1, 0.0
    r1 = hs[-2] / h
    d2 = (d1 - (history[-2] - history[-3]) / r1) / (r0 + r1)
    return d1 + d2 * r0, d2


def dpmpp_sde(
    denoiser: Denoiser, diffusion: Diffusion, z: Tensor, ts: Tensor, *, eta: float, noise_sampler: NoiseSampler
) -> Iterator[SamplerStep]:
    """DPM-Solver++ with a second stage at the midpoint of each step, and noise. 2 N - 1 calls for N steps.

    Source: Lu et al. 2022, algorithm 1 with r = 1/2, for the SDE. Both stages see the same noise up to the midpoint.
    """
    for i, (t, s) in enumerate(itertools.pairwise(ts)):
        denoised = denoiser(z, t.expand(len(z)))
        if s == 0:
            z = _step(diffusion, z, denoised, t, s)
        else:
            t_mid = _logsnr_midpoint(diffusion, t, s)
            first, second = (noise_sampler(2 * i), noise_sampler(2 * i + 1)) if eta else (None, None)
            z_mid = _step(diffusion, z, denoised, t, t_mid, eta=eta, noise=first)
            denoised = denoiser(z_mid, t_mid.expand(len(z)))
            z = _step(diffusion, z, denoised, t, t_mid, eta=eta, noise=first)
            z = _step(diffusion, z, denoised, t_mid, s, eta=eta, noise=second)
        yield SamplerStep(z, denoised)


def _logsnr_midpoint(diffusion: Diffusion, t: Tensor, s: Tensor) -> Tensor:
    """The t half-way from t to s in log-SNR, or in t itself where the signal is zero."""
    if diffusion.alpha(t) == 0:
        return (t + s) / 2
    return diffusion.t_from_noise_to_signal((diffusion.noise_to_signal(t) * diffusion.noise_to_signal(s)).sqrt())


def unipc(
    denoiser: Denoiser, diffusion: Diffusion, z: Tensor, ts: Tensor, *, noise_sampler: NoiseSampler
) -> Iterator[SamplerStep]:
    """UniPC of order 2 with B2 (Zhao et al. 2023, algorithms 5 and 6 for x0). One call a step.

    The predictor is DPM++ 2M; once x0 is predicted at the step's end, the corrector takes the step again with it.
    """
    z_last: Tensor | None = None  # before the step that is corrected
    t_last = ts[0]
    history: list[Tensor] = []  # the last two `denoised`, newest last
    hs: list[Tensor] = []
    for t, s in itertools.pairwise(ts):
        denoised = denoiser(z, t.expand(len(z)))
        if z_last is not None and hs[-1].isfinite():
            z = _step(diffusion, z_last, history[-1] + _corrector(denoised, history, hs), t_last, t)
        history = [*history[-1:], denoised]
        h = _log_snr(diffusion, s) - _log_snr(diffusion, t)
        z_last, t_last, denoised_d = z, t, denoised
        if hs and diffusion.sigma(s) > 0:
            denoised_d = denoised + (denoised - history[0]) * (h / (2 * hs[-1]))
        hs = [*hs[-1:], h]
        z = _step(diffusion, z, denoised_d, t, s)
        yield SamplerStep(z, denoised)


def _corrector(denoised: Tensor, history: list[Tensor], hs: list[Tensor]) -> Tensor:
    """What the corrector adds to the x0 at the step's start, given `denoised` at its end."""
    d_end = denoised - history[-1]
    if len(history) < 2 or not hs[-2].isfinite():
        return d_end / 2
    h, r = hs[-1], -hs[-2] / hs[-1]
    b_h = torch.expm1(-h)
    b_1 = -1 / h - 1 / b_h  # phi_2 and 2 phi_3 of -h, over phi_1
    b_2 = 2 * (-b_1 / h - 0.5 / b_h)
    rho = (b_2 - b_1) / (r - 1)
    return rho * (history[-2] - history[-1]) / r + (b_1 - rho) * d_end


def lcm(
    denoiser: Denoiser, diffusion: Diffusion, z: Tensor, ts: Tensor, *, noise_sampler: NoiseSampler
) -> Iterator[SamplerStep]:
    """For distilled networks: x0, noised anew (Song et al. 2023, algorithm 1; Luo et al. 2023). One call a step."""
    for i, (t, s) in enumerate(itertools.pairwise(ts)):
        denoised = denoiser(z, t.expand(len(z)))
        z = diffusion.alpha(s) * denoised
        if diffusion.sigma(s) > 0:
            z = z + diffusion.sigma(s) * noise_sampler(i)
        yield SamplerStep(z, denoised)


def ddim_invert(
    denoiser: Denoiser, diffusion: Diffusion, denoised: Tensor, ts: Tensor, noise: Tensor | None = None
) -> Iterator[SamplerStep]:
    """From x0 = `denoised` (b, ...) up to the noise from which `euler` makes it over the same falling `ts`.

    DDIM inversion (Song et al. 2021, section 4.3), N - 1 calls: each step takes its slope at the end that is known, so
    the way up is as exact as an Euler step is. The first one, to the least t, adds `noise` (b, ...), or none.
    """
    z = diffusion.alpha(ts[-2]) * denoised
    if noise is not None:
        z = z + diffusion.sigma(ts[-2]) * noise
    yield SamplerStep(z, denoised)
    for t, s in itertools.pairwise(ts[:-1].flip(0)):
        denoised = denoiser(z, t.expand(len(z)))
        noise = z - diffusion.alpha(t) * denoised  # times sigma(t)
        z = diffusion.alpha(s) * denoised + diffusion.sigma(s) / diffusion.sigma(t) * noise
        yield SamplerStep(z, denoised)


SAMPLERS: dict[str, tuple[Callable[..., Iterator[SamplerStep]], float | None]] = {
    "ddpm": (ddim, 1.0),
    "ddim": (ddim, 0.0),
    "euler": (euler, None),
    "euler_ancestral": (ddim, 1.0),
    "heun": (heun, 0.0),
    "dpmpp_2m": (dpmpp_2m, 0.0),
    "dpmpp_2m_sde": (dpmpp_2m, 1.0),
    "dpmpp_3m_sde": (dpmpp_3m_sde, 1.0),
    "dpmpp_sde": (dpmpp_sde, 1.0),
    "unipc": (unipc, None),
    "lcm": (lcm, None),
}
"""Each sampler with its default eta, the share of fresh noise; None where there is no choice."""


def get_sampler(name: str, eta: float | None = None) -> Sampler:
    """A sampler by name, with its default eta or this one; ValueError: an unknown name, or an eta it does not have."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown: choose one of {', '.join(SAMPLERS)}")
    sampler, default_eta = SAMPLERS[name]
    if default_eta is None:
        if eta is not None:
            raise ValueError(f"sampler {name} has no eta: leave it out")
        return sampler
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    return partial(sampler, eta=default_eta if eta is None else eta)


def final_latents(steps: Iterator[SamplerStep]) -> Tensor:
    """Run a sampler to its end: the latents (b, ...) after its last step."""
    return deque(steps, maxlen=1)[0].z
