"""How data becomes noise, what a network learns of it, and how its answer becomes data again."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ldm.config import Config

Path = Literal["linear", "scaled_linear", "cosine", "flow", "edm"]
Prediction = Literal["epsilon", "v", "x0", "flow"]
STEPS = 1000  # of the discrete paths
EDM_MAX, EDM_MIN, EDM_RHO = 80.0, 0.002, 7  # sigma of Karras et al. 2022, table 1, in deviations of the data


class ProcessConfig(Config):
    """The path from data (t = 0) to noise (t = 1), the target of training and its weighting."""

    path: Path = "scaled_linear"
    """betas of Ho et al. 2020 (linear), of Stable Diffusion (scaled_linear), of Nichol and Dhariwal 2021 (cosine); the
    straight line of flow matching; or the noise of EDM (Karras et al. 2022), which with prediction v is preconditioned
    as there"""
    zero_terminal_snr: bool = False
    """rescale the path so that t = 1 is pure noise (Lin et al. 2024)"""
    shift: float = Field(1.0, gt=0)
    """noise the flow path earlier, as large pictures need (Esser et al. 2024, equation 23); 3 for 1024 pixels there"""
    prediction: Prediction = "epsilon"
    """what the network guesses: the noise, v (Salimans and Ho 2022), the data, or noise - data"""
    min_snr_gamma: float | None = Field(None, gt=0)
    """weigh the error in the data by the signal-to-noise ratio, at most by this (Hang et al. 2023); 5 is usual"""
    snr_floor: float | None = Field(None, gt=0)
    """weigh the error in the data by the signal-to-noise ratio, at least by this (Salimans and Ho 2022); 1 is usual"""
    soft_min_snr_gamma: float | None = Field(None, gt=0)
    """weigh the error in the data by SNR gamma / (SNR + gamma), the smooth form of min-SNR (Crowson et al. 2024)"""
    p2_gamma: float | None = Field(None, gt=0)
    """weigh the error in the noise by (1 + SNR) ** -gamma (Choi et al. 2022); 1 is usual"""
    times: Literal["uniform", "stratified", "logit_normal", "log_normal"] = "uniform"
    """how t is drawn; stratified spreads one batch evenly over [0, 1]; log_normal is EDM's, for its path"""
    log_normal: tuple[float, float] = (-1.2, 1.2)
    """mean and deviation of the logarithm of EDM's sigma, for times log_normal"""

    def of_painting(self) -> dict[str, object]:
        """What decides how a trained network paints; the rest is of its training."""
        return self.model_dump(include={"path", "zero_terminal_snr", "shift", "prediction"})

    @model_validator(mode="after")
    def _check(self) -> "ProcessConfig":
        if self.zero_terminal_snr and self.path == "flow":
            raise ValueError("zero_terminal_snr: the flow path ends in pure noise already; leave it off")
        if self.zero_terminal_snr and self.path == "edm":
            raise ValueError("zero_terminal_snr: the edm path has no betas to rescale; leave it off")
        if self.shift != 1 and self.path != "flow":
            raise ValueError(f"shift {self.shift:g} is of the flow path, not of {self.path}; leave it at 1")
        if (self.times == "log_normal") != (self.path == "edm"):
            raise ValueError("times log_normal and path edm go together: choose both or neither")
        if sum((bool(self.min_snr_gamma or self.snr_floor), bool(self.soft_min_snr_gamma), bool(self.p2_gamma))) > 1:
            raise ValueError("min_snr_gamma, soft_min_snr_gamma and p2_gamma are different weights: choose one")
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
        self.discrete = config.path not in ("flow", "edm")
        self._alpha_bar = _alpha_bar(config) if self.discrete else torch.empty(0)

    @property
    def least_time(self) -> float:
        """The time of the least noise that training is meant for."""
        return (EDM_MIN / EDM_MAX) ** (1 / EDM_RHO) if self.config.path == "edm" else 1 / STEPS

    def alpha(self, t: Tensor) -> Tensor:
        """The signal's factor, from 1 at t = 0."""
        return self._factors(t)[0].to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """The noise's factor, from 0 at t = 0."""
        return self._factors(t)[1].to(t.dtype)

    def noise_level(self, t: Tensor) -> Tensor:
        """sigma / alpha, which EDM and others call sigma."""
        return self.sigma(t) / self.alpha(t)

    def time_of(self, level: Tensor) -> Tensor:
        """The inverse of `noise_level`, which grows with t; at most 1."""
        level = level.double()
        if self.config.path == "flow":
            straight, shift = level / (1 + level), self.config.shift
            return straight / (shift - (shift - 1) * straight)
        if self.config.path == "edm":
            return (level / EDM_MAX).pow(1 / EDM_RHO).clamp_max(1)
        table, signal = self._alpha_bar.to(level.device), 1 / (1 + level**2)
        low = (torch.searchsorted(-table, -signal) - 1).clamp(0, STEPS - 1)
        return ((low + (table[low] - signal) / (table[low] - table[low + 1])) / STEPS).clamp(0, 1)

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, float64."""
        if self.config.path == "flow":
            return 1 - self._straight(t), self._straight(t)
        if self.config.path == "edm":
            level = self._edm_sigma(t)
            return (1 + level**2).rsqrt(), level * (1 + level**2).rsqrt()
        signal = self._signal(t)
        return signal.sqrt(), (1 - signal).sqrt()

    def _straight(self, t: Tensor) -> Tensor:
        """sigma of the flow path at t, float64."""
        t, shift = t.double(), self.config.shift
        return shift * t / (1 + (shift - 1) * t)

    def _edm_sigma(self, t: Tensor) -> Tensor:
        """sigma of EDM at t, float64."""
        return EDM_MAX * t.double() ** EDM_RHO

    def _signal(self, t: Tensor) -> Tensor:
        """alpha squared of a discrete path at t, float64."""
        table = self._alpha_bar.to(t.device)
        place = t.double().clamp(0, 1) * STEPS
        if t.dtype != torch.float64:  # float32 is a little off the grid
            place = torch.where((place - place.round()).abs() < 1e-3, place.round(), place)
        low = place.floor().clamp_max(STEPS - 1).long()
        return torch.lerp(table[low], table[low + 1], place - low)

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told: the index 0...999 of a discrete path, 1000 sigma of the flow path.

        On the EDM path it is 1000 c_noise = 250 ln(sigma), since the network's embedding expects such numbers.
        """
        if self.config.path == "edm":
            return (250 * self._edm_sigma(t).log()).to(t.dtype)
        if self.config.path == "flow":
            return (self._straight(t) * STEPS).to(t.dtype)
        return t * STEPS - 1

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
        config = self.config
        alpha, sigma = self.alpha(t), self.sigma(t)
        snr = (alpha / sigma.clamp_min(1e-6)) ** 2
        if config.soft_min_snr_gamma:
            of_data = (
                snr * config.soft_min_snr_gamma / (snr + config.soft_min_snr_gamma)
            )  # weight of the error in the data
        elif config.p2_gamma:
            of_data = snr / (1 + snr) ** config.p2_gamma
        elif config.snr_floor or config.min_snr_gamma:
            of_data = snr.clamp(config.snr_floor, config.min_snr_gamma)
        else:
            return torch.ones_like(t)
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
        elif self.config.times in ("logit_normal", "log_normal"):
            normal = math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-0.999999, 0.999999))
            if self.config.times == "log_normal":  # Karras et al. 2022, table 1
                mean, deviation = self.config.log_normal
                return self.time_of((mean + deviation * normal).exp()).to(t.dtype)
            t = torch.sigmoid(normal)  # Esser et al. 2024, equation 19
        if not self.discrete:
            return t.clamp_min(1e-4)
        return ((t * STEPS).floor() + 1).clamp_max(STEPS) / STEPS


def denoiser(network: Callable[[Tensor, Tensor], Tensor], process: Process) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn a network (z_t, timestep) -> prediction into a Denoiser (z_t, t) -> data. t is (b,)."""
    return lambda z_t, t: process.to_data(network(z_t, process.timestep(t).to(z_t)).to(z_t.dtype), z_t, t)


def _wide(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like).reshape(-1, *[1] * (like.ndim - 1))


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
