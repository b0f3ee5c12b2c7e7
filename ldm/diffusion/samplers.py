"""From noise to data: each sampler is a generator of steps over a Denoiser; the caller owns the loop.

All are written in alpha and sigma, so they run on every path; their coefficients are float64 numbers on the CPU.
`_step` is the exact solution where the data is constant; a sampler is what it puts in for the data, and how much fresh
noise it takes.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoiser
from ldm.diffusion.process import Diffusion

NoiseSampler = Callable[[int], Tensor]
"""Number of the draw, from 0 -> new standard normal noise shaped as the latent."""


class SamplerStep(NamedTuple):
    """Where a sampler stands after a step."""

    z: Tensor  # at the new, lower time; the result after the last step
    denoised: Tensor  # the denoiser's newest guess


class Sampler(Protocol):
    """The one signature of all samplers, once `find_sampler` has bound eta. `times` falls to 0, float64."""

    def __call__(
        self, denoiser: Denoiser, process: Diffusion, z: Tensor, times: Tensor, *, fresh_noise: NoiseSampler
    ) -> Iterator[SamplerStep]: ...


def ddim(
    denoiser: Denoiser, process: Diffusion, z: Tensor, times: Tensor, *, eta: float, fresh_noise: NoiseSampler
) -> Iterator[SamplerStep]:
    """DDIM (Song et al. 2021, equation 12): eta 0 is deterministic, eta 1 has DDPM's variance. One call a step.

    With eta 1 it is ancestral sampling with the posterior's own variance (DDPM, Ho et al. 2020, equation 7), and also
    what is called Euler ancestral: there in the noise's share of sigma / alpha, here in alpha and sigma.
    """
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        data = denoiser(z, t.expand(len(z)))
        noise = (z - process.alpha(t) * data) / process.sigma(t)
        sigma = process.sigma(s)
        spread = eta * sigma * (1 - _exp_neg_h(process, t, s) ** 2).sqrt()
        z = process.alpha(s) * data + (sigma**2 - spread**2).clamp_min(0).sqrt() * noise
        if eta and sigma > 0:
            z = z + spread * fresh_noise(i)
        yield SamplerStep(z, data)


def euler(
    denoiser: Denoiser, process: Diffusion, z: Tensor, times: Tensor, *, fresh_noise: NoiseSampler
) -> Iterator[SamplerStep]:
    """Euler's method on d(z / sigma) = data d(alpha / sigma) (the ODE of Karras et al. 2022, equation 1, rewritten).

    It is the same step as DDIM with eta 0, and as Euler on d(z / alpha) = noise d(sigma / alpha). One call a step.
    """
    for t, s in itertools.pairwise(times):
        data = denoiser(z, t.expand(len(z)))
        z = _step(process, z, data, t, s)
        yield SamplerStep(z, data)


def heun(
    denoiser: Denoiser, process: Diffusion, z: Tensor, times: Tensor, *, eta: float, fresh_noise: NoiseSampler
) -> Iterator[SamplerStep]:
    """Heun's method on the same equation (Karras et al. 2022, algorithms 1 and 2). 2 N - 1 calls for N steps.

    Eta is the churn: each step first goes up to 1 + eta (sqrt 2 - 1) times the noise, EDM's most at eta 1. The mean is
    taken of the two guesses of the data, not of the noise: that stays bounded where the signal vanishes.
    """
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        if eta and process.alpha(t) > 0:
            z, t = _churn(process, z, t, 1 + eta * (math.sqrt(2) - 1), fresh_noise(i))
        data = denoiser(z, t.expand(len(z)))
        if s > 0:
            data = (data + denoiser(_step(process, z, data, t, s), s.expand(len(z)))) / 2
        z = _step(process, z, data, t, s)
        yield SamplerStep(z, data)


def dpmpp_2m(
    denoiser: Denoiser, process: Diffusion, z: Tensor, times: Tensor, *, eta: float, fresh_noise: NoiseSampler
) -> Iterator[SamplerStep]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order from the guess before. One call a step.

    Eta 1 is its SDE: the step of equation 18 there with the midpoint's guess.
    """
    before: Tensor | None = None
    h_before = torch.tensor(0.0)
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        data = denoiser(z, t.expand(len(z)))
        h = _log_snr(process, s) - _log_snr(process, t)
        middle = data
        if before is not None and process.sigma(s) > 0:  # the last step to t = 0 is of first order
            middle = data + (data - before) * (h / (2 * h_before))
        z = _step(process, z, middle, t, s, eta=eta, noise=fresh_noise(i) if eta else None)
        before, h_before = data, h
        yield SamplerStep(z, data)


def dpmpp_3m_sde(
    denoiser: Denoiser, process: Diffusion, z: Tensor, times: Tensor, *, eta: float, fresh_noise: NoiseSampler
) -> Iterator[SamplerStep]:
    """DPM-Solver++(3M) with noise: a parabola through three guesses, integrated exactly. One call a step.

    Source: the multistep exponential integrator of Lu et al. 2022 (appendix B), for the SDE; eta 0 is the ODE.
    """
    guesses: list[Tensor] = []  # newest last
    spans: list[Tensor] = []  # in log SNR, between the guesses
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        data = denoiser(z, t.expand(len(z)))
        guesses = [*guesses[-2:], data]
        h = _log_snr(process, s) - _log_snr(process, t)
        z = _step(process, z, data, t, s, eta=eta, noise=fresh_noise(i) if eta else None)
        if len(guesses) > 1 and process.sigma(s) > 0:
            slope, bend = _divided_differences(guesses, spans, h)
            grown = h * (1 + eta)
            phi_2 = torch.expm1(-grown) / grown + 1
            z = z + process.alpha(s) * (phi_2 * slope - (phi_2 / grown - 0.5) * bend)
        spans = [*spans[-1:], h]
        yield SamplerStep(z, data)


def dpmpp_sde(
    denoiser: Denoiser, process: Diffusion, z: Tensor, times: Tensor, *, eta: float, fresh_noise: NoiseSampler
) -> Iterator[SamplerStep]:
    """DPM-Solver++ with a stage in the middle of each step, and noise. 2 N - 1 calls for N steps.

    Source: the single-step solver of Lu et al. 2022 (algorithm 1, r = 1/2), for the SDE. Both stages see one Brownian
    path: what was drawn down to the middle is drawn again for the whole step.
    """
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        data = denoiser(z, t.expand(len(z)))
        if s == 0:
            z = _step(process, z, data, t, s)
        else:
            middle = _logsnr_midpoint(process, t, s)
            first, second = (fresh_noise(2 * i), fresh_noise(2 * i + 1)) if eta else (None, None)
            data = denoiser(_step(process, z, data, t, middle, eta=eta, noise=first), middle.expand(len(z)))
            z = _step(process, z, data, t, middle, eta=eta, noise=first)
            z = _step(process, z, data, middle, s, eta=eta, noise=second)
        yield SamplerStep(z, data)


def unipc(
    denoiser: Denoiser, process: Diffusion, z: Tensor, times: Tensor, *, fresh_noise: NoiseSampler
) -> Iterator[SamplerStep]:
    """UniPC of order 2 with B2 (Zhao et al. 2023, algorithms 5 and 6 for the data). One call a step.

    The predictor is DPM++ 2M; once the guess at its end is known, the corrector takes the step again with it.
    """
    start: tuple[Tensor, Tensor] | None = None  # z and t before the step that is to be corrected
    guesses: list[Tensor] = []  # at the last two times, newest last
    spans: list[Tensor] = []
    for t, s in itertools.pairwise(times):
        data = denoiser(z, t.expand(len(z)))
        if start is not None and spans[-1].isfinite():
            z = _step(process, start[0], guesses[-1] + _corrector(data, guesses, spans), start[1], t)
        guesses = [*guesses[-1:], data]
        h = _log_snr(process, s) - _log_snr(process, t)
        start, middle = (z, t), data
        if spans and process.sigma(s) > 0:
            middle = data + (data - guesses[0]) * (h / (2 * spans[-1]))
        spans = [*spans[-1:], h]
        z = _step(process, z, middle, t, s)
        yield SamplerStep(z, data)


def lcm(
    denoiser: Denoiser, process: Diffusion, z: Tensor, times: Tensor, *, fresh_noise: NoiseSampler
) -> Iterator[SamplerStep]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023): the guess, noised anew.

    For networks that were distilled to guess the data in one call. One call a step.
    """
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        data = denoiser(z, t.expand(len(z)))
        z = process.alpha(s) * data
        if process.sigma(s) > 0:
            z = z + process.sigma(s) * fresh_noise(i)
        yield SamplerStep(z, data)


def ddim_invert(denoiser: Denoiser, process: Diffusion, data: Tensor, times: Tensor) -> Iterator[SamplerStep]:
    """From data back to the noise that `euler` would make them of, over the same falling `times`. N - 1 calls.

    DDIM inversion (Song et al. 2021, section 4.3): each step takes its slope at the end that is known, so the way back
    is as exact as an Euler step is. The first one, to the least noise, adds none.
    """
    z = process.alpha(times[-2]) * data
    yield SamplerStep(z, data)
    for t, s in itertools.pairwise(times[:-1].flip(0)):
        guess = denoiser(z, t.expand(len(z)))
        z = process.alpha(s) * guess + process.sigma(s) / process.sigma(t) * (z - process.alpha(t) * guess)
        yield SamplerStep(z, guess)


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
"""Each sampler with its own eta, the share of fresh noise; None where there is nothing to choose."""


def get_sampler(name: str, eta: float | None = None) -> Sampler:
    """A sampler by name, with its own eta or this one; ValueError lists the names, or says that it takes no eta."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown: choose one of {', '.join(SAMPLERS)}")
    walk, usual = SAMPLERS[name]
    if usual is None:
        if eta is not None:
            raise ValueError(f"sampler {name} has no eta to choose: leave it out")
        return walk
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    return partial(walk, eta=usual if eta is None else eta)


def final_latents(steps: Iterator[SamplerStep]) -> Tensor:
    """Walk through a sampler to its end and return the result."""
    z = None
    for step in steps:
        z = step.z
    assert z is not None
    return z


def _step(
    process: Diffusion, z: Tensor, data: Tensor, t: Tensor, s: Tensor, *, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """From t down to s, exactly where `data` is constant in between (Lu et al. 2022, equations 9 and 18 at order 1)."""
    ratio, sigma = _exp_neg_h(process, t, s), process.sigma(s)
    z = sigma / process.sigma(t) * ratio**eta * z + process.alpha(s) * (1 - ratio ** (1 + eta)) * data
    return z if noise is None else z + sigma * (1 - ratio ** (2 * eta)).sqrt() * noise


def _exp_neg_h(process: Diffusion, t: Tensor, s: Tensor) -> Tensor:
    """What remains of sigma / alpha from t to s: exp(-h) in terms of log SNR, in [0, 1)."""
    return (process.sigma(s) / process.alpha(s)) * (process.alpha(t) / process.sigma(t))


def _log_snr(process: Diffusion, t: Tensor) -> Tensor:
    """lambda(t) = log(alpha / sigma); infinite at the ends of some paths."""
    return process.alpha(t).log() - process.sigma(t).log()


def _logsnr_midpoint(process: Diffusion, t: Tensor, s: Tensor) -> Tensor:
    """The time half-way from t to s in log SNR, or in time where t has no signal."""
    if process.alpha(t) == 0:
        return (t + s) / 2
    return process.t_from_noise_to_signal((process.noise_to_signal(t) * process.noise_to_signal(s)).sqrt())


def _churn(process: Diffusion, z: Tensor, t: Tensor, factor: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Noise is added until sigma / alpha is `factor` times as large, or t = 1 is reached."""
    up = process.t_from_noise_to_signal(process.noise_to_signal(t) * factor)
    kept = process.alpha(up) / process.alpha(t)
    return kept * z + (process.sigma(up) ** 2 - (kept * process.sigma(t)) ** 2).clamp_min(0).sqrt() * noise, up


def _divided_differences(guesses: list[Tensor], spans: list[Tensor], h: Tensor) -> tuple[Tensor, Tensor | float]:
    """Slope and bend, in units of the step `h`, of the parabola through the newest guesses at the newest."""
    near = spans[-1] / h
    slope = (guesses[-1] - guesses[-2]) / near
    if len(guesses) < 3:
        return slope, 0.0
    far = spans[-2] / h
    bend = (slope - (guesses[-2] - guesses[-3]) / far) / (near + far)
    return slope + bend * near, bend


def _corrector(data: Tensor, guesses: list[Tensor], spans: list[Tensor]) -> Tensor:
    """What to add to the guess at the step's start, now that the guess at its end is `data`."""
    end = data - guesses[-1]
    if len(guesses) < 2 or not spans[-2].isfinite():
        return end / 2
    h, back = spans[-1], -spans[-2] / spans[-1]
    shrunk = torch.expm1(-h)
    first = -1 / h - 1 / shrunk  # phi_2 and 2 phi_3 of -h, over phi_1
    second = 2 * (-first / h - 0.5 / shrunk)
    weight = (second - first) / (back - 1)
    return weight * (guesses[-2] - guesses[-1]) / back + (first - weight) * end
