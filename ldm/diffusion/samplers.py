"""From noise to data: each sampler is a generator of steps over a Denoiser; the caller owns the loop."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoiser
from ldm.diffusion.process import Process

FreshNoise = Callable[[int], Tensor]
"""Step number -> new standard normal noise shaped as the latent."""


class Step(NamedTuple):
    """Where a sampler stands after a step."""

    z: Tensor  # at the new, lower time; the result after the last step
    data: Tensor  # the denoiser's newest guess


class Sampler(Protocol):
    """The one signature of all samplers. `times` falls from the noise's time to 0."""

    def __call__(
        self, denoiser: Denoiser, process: Process, z: Tensor, times: Tensor, *, eta: float, fresh_noise: FreshNoise
    ) -> Iterator[Step]: ...


def ddim(
    denoiser: Denoiser, process: Process, z: Tensor, times: Tensor, *, eta: float, fresh_noise: FreshNoise
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, equation 12): eta 0 is deterministic, eta 1 has DDPM's variance. One call a step."""
    for i, (t, s) in enumerate(_pairs(times, z)):
        data = denoiser(z, t.expand(len(z)))
        noise = _noise(process, z, data, t)
        alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
        variance = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp_min(0)  # of the step from s to t
        spread = eta * variance.sqrt() * sigma_s / sigma_t
        z = alpha_s * data + (sigma_s**2 - spread**2).clamp_min(0).sqrt() * noise
        if eta and sigma_s > 0:
            z = z + spread * fresh_noise(i)
        yield Step(z, data)


def ddpm(
    denoiser: Denoiser, process: Process, z: Tensor, times: Tensor, *, eta: float, fresh_noise: FreshNoise
) -> Iterator[Step]:
    """Ancestral sampling with the posterior's own variance (Ho et al. 2020, equation 7): DDIM with eta 1."""
    return ddim(denoiser, process, z, times, eta=1.0, fresh_noise=fresh_noise)


def euler(
    denoiser: Denoiser, process: Process, z: Tensor, times: Tensor, *, eta: float, fresh_noise: FreshNoise
) -> Iterator[Step]:
    """Euler's method on d(z / sigma) = data d(alpha / sigma) (the ODE of Karras et al. 2022, equation 1, rewritten).

    It is the same step as DDIM with eta 0, and as Euler on d(z / alpha) = noise d(sigma / alpha). One call a step.
    """
    for t, s in _pairs(times, z):
        data = denoiser(z, t.expand(len(z)))
        z = _move(process, z, data, t, s)
        yield Step(z, data)


def heun(
    denoiser: Denoiser, process: Process, z: Tensor, times: Tensor, *, eta: float, fresh_noise: FreshNoise
) -> Iterator[Step]:
    """Heun's method on the same equation (Karras et al. 2022, algorithm 1). 2 N - 1 calls for N steps.

    The mean is taken of the two guesses of the data, not of the noise: that stays bounded where the signal vanishes.
    """
    for t, s in _pairs(times, z):
        data = denoiser(z, t.expand(len(z)))
        z_next = _move(process, z, data, t, s)
        if s > 0:
            data = (data + denoiser(z_next, s.expand(len(z)))) / 2
            z_next = _move(process, z, data, t, s)
        z = z_next
        yield Step(z, data)


def dpmpp_2m(
    denoiser: Denoiser, process: Process, z: Tensor, times: Tensor, *, eta: float, fresh_noise: FreshNoise
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order from the guess before. One call a step."""
    before: Tensor | None = None
    h_before = torch.tensor(0.0)
    for t, s in _pairs(times, z):
        data = denoiser(z, t.expand(len(z)))
        h = _log_snr(process, s) - _log_snr(process, t)
        slope = torch.zeros_like(z)
        if before is not None and process.sigma(s) > 0:  # the last step to t = 0 is of first order
            slope = (data - before) * (h / (2 * h_before))
        z = process.sigma(s) / process.sigma(t) * z - process.alpha(s) * torch.expm1(-h) * (data + slope)
        before, h_before = data, h
        yield Step(z, data)


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def find_sampler(name: str) -> Sampler:
    """A sampler by name; ValueError lists the names."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def run(steps: Iterator[Step]) -> Tensor:
    """Walk through a sampler to its end and return the result."""
    z = None
    for step in steps:
        z = step.z
    assert z is not None
    return z


def _pairs(times: Tensor, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    times = times.to(like)
    return list(itertools.pairwise(times))


def _noise(process: Process, z: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """The noise that z holds beside the data."""
    return (z - process.alpha(t) * data) / process.sigma(t)


def _move(process: Process, z: Tensor, data: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From t to s on the straight line that `data` and the noise in z span."""
    return process.alpha(s) * data + process.sigma(s) * _noise(process, z, data, t)


def _log_snr(process: Process, t: Tensor) -> Tensor:
    """lambda(t) = log(alpha / sigma); infinite at the ends of some paths."""
    return process.alpha(t).log() - process.sigma(t).log()
