"""How data becomes noise, what a network learns of it, and how its answer becomes data again."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ldm.config import Config

Path = Literal["linear", "scaled_linear", "cosine", "flow"]
Prediction = Literal["epsilon", "v", "x0", "flow"]
STEPS = 1000  # of the discrete paths


class ProcessConfig(Config):
    """The path from data (t = 0) to noise (t = 1), the target of training and its weighting."""

    path: Path = "scaled_linear"
    """betas of Ho et al. 2020 (linear), of Stable Diffusion (scaled_linear), of Nichol and Dhariwal 2021 (cosine), or
    the straight line of flow matching"""
    zero_terminal_snr: bool = False
    """rescale the path so that t = 1 is pure noise (Lin et al. 2024)"""
    prediction: Prediction = "epsilon"
    """what the network guesses: the noise, v (Salimans and Ho 2022), the data, or noise - data"""
    min_snr_gamma: float | None = Field(None, gt=0)
    """weigh the error in the data by the signal-to-noise ratio, at most by this (Hang et al. 2023); 5 is usual"""
    snr_floor: float | None = Field(None, gt=0)
    """weigh the error in the data by the signal-to-noise ratio, at least by this (Salimans and Ho 2022); 1 is usual"""
    times: Literal["uniform", "stratified", "logit_normal"] = "uniform"
    """how t is drawn; stratified spreads one batch evenly over [0, 1]"""

    @model_validator(mode="after")
    def _check(self) -> "ProcessConfig":
        if self.zero_terminal_snr and self.path == "flow":
            raise ValueError("zero_terminal_snr: the flow path ends in pure noise already; leave it off")
        if self.snr_floor and self.min_snr_gamma and self.snr_floor > self.min_snr_gamma:
            raise ValueError(f"snr_floor {self.snr_floor:g} is above min_snr_gamma {self.min_snr_gamma:g}: lower it")
        if self.prediction == "epsilon" and (self.zero_terminal_snr or self.path == "flow"):
            raise ValueError(
                "prediction epsilon says nothing about the data where the signal is zero, as it is at t = 1 here: "
                "choose v, x0 or flow"
            )
        return self


class Process:
    """A path z_t = alpha(t) data + sigma(t) noise with t in [0, 1], and a training target on it.

    The discrete paths are defined at t = k / 1000; between those alpha squared is linear in t. Times are (b,) tensors
    or scalars; alpha and sigma are computed in float64 and come back in the dtype of t.
    """

    def __init__(self, config: ProcessConfig) -> None:
        self.config = config
        self._alpha_bar = None if config.path == "flow" else _alpha_bar(config)

    def alpha(self, t: Tensor) -> Tensor:
        """The signal's factor, from 1 at t = 0."""
        return (1 - t.double() if self._alpha_bar is None else self._signal(t).sqrt()).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """The noise's factor, from 0 at t = 0."""
        return (t.double() if self._alpha_bar is None else (1 - self._signal(t)).sqrt()).to(t.dtype)

    def _signal(self, t: Tensor) -> Tensor:
        """alpha squared at t, float64."""
        assert self._alpha_bar is not None
        table = self._alpha_bar.to(t.device)
        place = t.double().clamp(0, 1) * STEPS
        place = torch.where((place - place.round()).abs() < 1e-3, place.round(), place)  # float32 is off the grid
        low = place.floor().clamp_max(STEPS - 1).long()
        return torch.lerp(table[low], table[low + 1], place - low)

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told: the index 0...999 on the discrete paths, 1000 t on the flow path."""
        return t * STEPS - (0 if self._alpha_bar is None else 1)

    def mix(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noised data z_t (Ho et al. 2020, equation 4)."""
        return _wide(self.alpha(t), z) * z + _wide(self.sigma(t), z) * noise

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "x0":
            return z
        if self.config.prediction == "flow":
            return noise - z
        return _wide(self.alpha(t), z) * noise - _wide(self.sigma(t), z) * z

    def to_data(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The data that a prediction stands for: the inverse of `target`."""
        alpha, sigma = _wide(self.alpha(t), z_t), _wide(self.sigma(t), z_t)
        if self.config.prediction == "epsilon":
            return (z_t - sigma * prediction) / alpha
        if self.config.prediction == "x0":
            return prediction
        if self.config.prediction == "flow":
            return (z_t - sigma * prediction) / (alpha + sigma)
        return (alpha * z_t - sigma * prediction) / (alpha**2 + sigma**2)

    def weight(self, t: Tensor) -> Tensor:
        """Factor of the target's squared error at t: 1, or so that the error in the data weighs a clamped SNR.

        Source: min-SNR-gamma (Hang et al. 2023, equation 5), truncated SNR (Salimans and Ho 2022, section 4).
        """
        floor, gamma = self.config.snr_floor, self.config.min_snr_gamma
        if floor is None and gamma is None:
            return torch.ones_like(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        snr = (alpha / sigma.clamp_min(1e-6)) ** 2
        of_data = snr.clamp(floor, gamma)  # weight of the error in the data
        if self.config.prediction == "epsilon":
            return of_data / snr
        if self.config.prediction == "x0":
            return of_data
        if self.config.prediction == "flow":
            return of_data * (sigma / (alpha + sigma)) ** 2
        return of_data * sigma**2 / (alpha**2 + sigma**2) ** 2

    def draw_times(self, uniform: Tensor, positions: Tensor, batch_size: int) -> Tensor:
        """Times in (0, 1] from one uniform number for each sample and its position in the whole batch.

        On the discrete paths they are whole steps, k / 1000.
        """
        t = uniform
        if self.config.times == "stratified":
            t = (positions + uniform) / batch_size
        elif self.config.times == "logit_normal":  # Esser et al. 2024, equation 19
            t = torch.sigmoid(math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-0.999999, 0.999999)))
        if self._alpha_bar is None:
            return t.clamp_min(1e-4)
        return ((t * STEPS).floor() + 1).clamp_max(STEPS) / STEPS


def times(steps: int, *, start: float = 1.0) -> Tensor:
    """`steps` + 1 times from `start` down to 0, evenly spaced ("trailing"): float64."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)


def denoiser(network: Callable[[Tensor, Tensor], Tensor], process: Process) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn a network (z_t, timestep) -> prediction into a Denoiser (z_t, t) -> data. t is (b,)."""
    return lambda z_t, t: process.to_data(network(z_t, process.timestep(t)).to(z_t.dtype), z_t, t)


def _wide(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _alpha_bar(config: ProcessConfig) -> Tensor:
    """Cumulative product of 1 - beta at steps 0 (data) to 1000: (1001,), float64."""
    if config.path == "cosine":
        angle = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS + 0.008) / 1.008 * math.pi / 2
        bar = angle.cos() ** 2
        beta = (1 - bar[1:] / bar[:-1]).clamp_max(0.999)
    elif config.path == "linear":
        beta = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
    else:
        beta = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), STEPS, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)
    if config.zero_terminal_snr:  # Lin et al. 2024, algorithm 1
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return torch.cat([alpha_bar.new_ones(1), alpha_bar])
