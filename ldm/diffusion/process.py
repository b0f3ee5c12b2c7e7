"""Noise schedule, training target, loss weight, and conversion of a prediction back to x0."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ldm.config import Config

NUM_TRAIN_TIMESTEPS = 1000  # of the discrete schedules
EDM_SIGMA_MAX, EDM_SIGMA_MIN, EDM_RHO = 80.0, 0.002, 7  # Karras et al. 2022, table 1, for data of standard deviation 1


class DiffusionConfig(Config):
    """The noise schedule from data (t = 0) to noise (t = 1), the training target and its loss weight."""

    noise_schedule: Literal["linear", "scaled_linear", "cosine", "flow", "edm"] = "scaled_linear"
    """betas of Ho et al. 2020 (linear), of Stable Diffusion (scaled_linear), of Nichol and Dhariwal 2021 (cosine); the
    straight line of flow matching (flow); or EDM (Karras et al. 2022), which with prediction v has its
    preconditioning"""
    zero_terminal_snr: bool = False
    """rescale the betas so that t = 1 is pure noise (Lin et al. 2024)"""
    shift: float = Field(1.0, gt=0)
    """shift the flow schedule towards noise, as high resolutions need (Esser et al. 2024, equation 23); 3 for 1024
    pixels there"""
    t_min: float = Field(0.0, ge=0, lt=1)
    """least t of the flow schedule: the network is neither trained nor called at less noise, and the x0 that it
    predicts there is the result. A small network adds errors where there is little noise, and removes none"""
    prediction: Literal["epsilon", "v", "x0", "flow"] = "epsilon"
    """what the network predicts: the noise, v (Salimans and Ho 2022), x0, or the flow velocity noise - x0"""
    loss_weighting: Literal["uniform", "min_snr", "soft_min_snr", "p2"] = "uniform"
    """weight of the error: 1; by the SNR between snr_floor and gamma (Hang et al. 2023; Salimans and Ho 2022); by
    SNR gamma / (SNR + gamma) (Crowson et al. 2024); by (1 + SNR) ** -gamma of the noise's error (Choi et al. 2022)"""
    gamma: float | None = Field(None, gt=0)
    """of the loss weighting; 5 is usual for both min_snr, 1 for p2"""
    snr_floor: float | None = Field(None, gt=0)
    """least weight of min_snr; 1 is usual"""
    t_distribution: Literal["uniform", "stratified", "logit_normal", "log_normal"] = "uniform"
    """how training samples t; stratified spreads one batch evenly from t_min to 1; log_normal is EDM's, for its
    schedule"""
    log_normal_mean_std: tuple[float, float] = (-1.2, 1.2)
    """mean and standard deviation of the logarithm of EDM's sigma (P_mean, P_std), for log_normal"""

    def inference_fields(self) -> dict[str, object]:
        """What decides how a trained network samples; the rest matters in training only."""
        return self.model_dump(include={"noise_schedule", "zero_terminal_snr", "shift", "t_min", "prediction"})

    @model_validator(mode="after")
    def _check(self) -> "DiffusionConfig":
        if self.zero_terminal_snr and self.noise_schedule in ("flow", "edm"):
            raise ValueError(f"zero_terminal_snr: {self.noise_schedule} has no betas to rescale; leave it off")
        for name, value, neutral in (("shift", self.shift, 1), ("t_min", self.t_min, 0)):
            if value != neutral and self.noise_schedule != "flow":
                raise ValueError(f"{name} {value:g} belongs to noise_schedule flow, not {self.noise_schedule}")
        if (self.t_distribution == "log_normal") != (self.noise_schedule == "edm"):
            raise ValueError("t_distribution log_normal and noise_schedule edm go together: choose both or neither")
        if self.prediction == "epsilon" and (self.zero_terminal_snr or self.noise_schedule == "flow"):
            raise ValueError("prediction epsilon is undefined at zero SNR, as here at t = 1: choose v, x0 or flow")
        if self.loss_weighting == "uniform" and (self.gamma or self.snr_floor):
            raise ValueError("gamma and snr_floor need a loss_weighting: choose min_snr, soft_min_snr or p2")
        if self.snr_floor and self.loss_weighting != "min_snr":
            raise ValueError(f"snr_floor belongs to loss_weighting min_snr, not {self.loss_weighting}")
        if self.loss_weighting != "uniform" and not self.gamma and not self.snr_floor:
            raise ValueError(f"loss_weighting {self.loss_weighting} needs gamma")
        if self.snr_floor and self.gamma and self.snr_floor > self.gamma:
            raise ValueError(f"snr_floor {self.snr_floor:g} is above gamma {self.gamma:g}: lower it")
        return self


class Diffusion:
    """z_t = alpha(t) x0 + sigma(t) noise with t in [0, 1], and a training target.

    The discrete schedules are defined at t = k / 1000; in between, alpha squared is linear in t. t is a scalar or (b,);
    alpha and sigma are computed in float64 and returned in the dtype and on the device of t.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.discrete = config.noise_schedule not in ("flow", "edm")
        self._alpha_bar = _alpha_bar(config) if self.discrete else torch.empty(0)
        self.least_t = config.t_min or 1 / NUM_TRAIN_TIMESTEPS  # of the least noise that training is meant for
        if config.noise_schedule == "edm":
            self.least_t = (EDM_SIGMA_MIN / EDM_SIGMA_MAX) ** (1 / EDM_RHO)

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the signal, 1 at t = 0; shaped as t."""
        return self._factors(t)[0].to(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise, 0 at t = 0; shaped as t."""
        return self._factors(t)[1].to(t)

    def noise_to_signal(self, t: Tensor) -> Tensor:
        """sigma / alpha, which EDM and k-diffusion call sigma; shaped as t."""
        return self.sigma(t) / self.alpha(t)

    def t_from_noise_to_signal(self, level: Tensor) -> Tensor:
        """The inverse of `noise_to_signal`, which grows with t; at most 1. Any shape, float64."""
        level = _float64(level)
        if self.config.noise_schedule == "flow":
            sigma, shift = level / (1 + level), self.config.shift
            return sigma / (shift - (shift - 1) * sigma)
        if self.config.noise_schedule == "edm":
            return (level / EDM_SIGMA_MAX).pow(1 / EDM_RHO).clamp_max(1)
        table, alpha_bar = self._alpha_bar.to(level.device), 1 / (1 + level**2)
        low = (torch.searchsorted(-table, -alpha_bar) - 1).clamp(0, NUM_TRAIN_TIMESTEPS - 1)
        fraction = (table[low] - alpha_bar) / (table[low] - table[low + 1])
        return ((low + fraction) / NUM_TRAIN_TIMESTEPS).clamp(0, 1)

    def network_timestep(self, t: Tensor) -> Tensor:
        """What the network embeds, shaped as t: the index 0...999 of a discrete schedule, 1000 sigma of flow.

        For edm it is 1000 c_noise = 250 ln(sigma), since the embedding expects numbers of that size.
        """
        if self.config.noise_schedule == "edm":
            return (250 * self._edm_sigma(t).log()).to(t)
        if self.config.noise_schedule == "flow":
            return (self._flow_sigma(t) * NUM_TRAIN_TIMESTEPS).to(t)
        return t * NUM_TRAIN_TIMESTEPS - 1

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t (b, ...) from x0 and noise (b, ...) at t (b,) (Ho et al. 2020, equation 4)."""
        return _expand_as(self.alpha(t), z) * z + _expand_as(self.sigma(t), z) * noise

    def training_target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict, (b, ...), for x0 and noise (b, ...) at t (b,)."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "x0":
            return z
        if self.config.prediction == "flow":
            return noise - z
        return _expand_as(self.alpha(t), z) * noise - _expand_as(self.sigma(t), z) * z

    def predict_x0(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that a prediction (b, ...) at z_t (b, ...), t (b,) implies: the inverse of `training_target`."""
        alpha, sigma = _expand_as(self.alpha(t), z_t), _expand_as(self.sigma(t), z_t)
        if self.config.prediction == "epsilon":
            return (z_t - sigma * prediction) / alpha
        if self.config.prediction == "x0":
            return prediction
        if self.config.prediction == "flow":
            return (z_t - sigma * prediction) / (alpha + sigma)
        return (alpha * z_t - sigma * prediction) / (alpha**2 + sigma**2)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Factor of the target's squared error at t, shaped as t: 1, or so that x0's error has the weight w(SNR).

        Sources: see `DiffusionConfig.loss_weighting`; Hang et al. 2023, equation 5; Salimans and Ho 2022, section 4.
        """
        config = self.config
        if config.loss_weighting == "uniform":
            return torch.ones_like(t)
        gamma = math.inf if config.gamma is None else config.gamma
        alpha, sigma = self.alpha(t), self.sigma(t)
        snr = (alpha / sigma.clamp_min(1e-6)) ** 2
        if config.loss_weighting == "min_snr":
            x0_weight = snr.clamp(config.snr_floor or 0.0, gamma)
        elif config.loss_weighting == "soft_min_snr":
            x0_weight = snr * gamma / (snr + gamma)
        else:
            x0_weight = snr / (1 + snr) ** gamma
        if config.prediction == "epsilon":
            return x0_weight / snr
        if config.prediction == "x0":
            return x0_weight
        if config.prediction == "flow":
            return x0_weight * (sigma / (alpha + sigma)) ** 2
        return x0_weight * sigma**2 / (alpha**2 + sigma**2) ** 2

    def sample_t(self, uniform: Tensor, positions: Tensor, batch_size: int) -> Tensor:
        """t (b,) in (0, 1], k / 1000 where discrete, at least the configured t_min, for training.

        It is made of a uniform number and the batch position of each sample.
        """
        t = uniform
        if self.config.t_distribution == "stratified":
            t = (positions + uniform) / batch_size
        elif self.config.t_distribution in ("logit_normal", "log_normal"):
            normal = math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-0.999999, 0.999999))
            if self.config.t_distribution == "log_normal":  # Karras et al. 2022, table 1
                mean, std = self.config.log_normal_mean_std
                return self.t_from_noise_to_signal((mean + std * normal).exp()).to(t)
            t = torch.sigmoid(normal)  # Esser et al. 2024, equation 19
        if not self.discrete:
            return (self.config.t_min + (1 - self.config.t_min) * t).clamp_min(1e-4)
        return ((t * NUM_TRAIN_TIMESTEPS).floor() + 1).clamp_max(NUM_TRAIN_TIMESTEPS) / NUM_TRAIN_TIMESTEPS

    def denoiser(self, network: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """Turn a network (z_t, t) -> prediction into a Denoiser (z_t, t) -> x0; z_t is (b, ...), t (b,)."""
        return lambda z_t, t: self.predict_x0(network(z_t, t).to(z_t.dtype), z_t, t)

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, float64."""
        if self.config.noise_schedule == "flow":
            sigma = self._flow_sigma(t)
            return 1 - sigma, sigma
        if self.config.noise_schedule == "edm":
            edm_sigma = self._edm_sigma(t)
            alpha = (1 + edm_sigma**2).rsqrt()
            return alpha, edm_sigma * alpha
        alpha_bar = self._alpha_bar_at(t)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _flow_sigma(self, t: Tensor) -> Tensor:
        """sigma of the flow schedule at t, float64."""
        t, shift = _float64(t), self.config.shift
        return shift * t / (1 + (shift - 1) * t)

    def _edm_sigma(self, t: Tensor) -> Tensor:
        """sigma of EDM at t, float64."""
        return EDM_SIGMA_MAX * _float64(t) ** EDM_RHO

    def _alpha_bar_at(self, t: Tensor) -> Tensor:
        """alpha squared of a discrete schedule at t, float64."""
        step = _float64(t).clamp(0, 1) * NUM_TRAIN_TIMESTEPS
        table = self._alpha_bar = self._alpha_bar.to(step.device)  # it stays there for the next step
        if t.dtype != torch.float64:  # float32 is a little off the whole steps
            step = torch.where((step - step.round()).abs() < 1e-3, step.round(), step)
        low = step.floor().clamp_max(NUM_TRAIN_TIMESTEPS - 1).long()
        return torch.lerp(table[low], table[low + 1], step - low)


def _float64(numbers: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none, as Apple's GPUs."""
    return (numbers.cpu() if numbers.device.type == "mps" else numbers).double()


def _expand_as(factor: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b, 1, ...), in the dtype and on the device of `like`, without waiting for that."""
    factor = factor.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
    if factor.is_cpu and like.is_cuda:
        return factor.pin_memory().to(like.device, non_blocking=True)
    return factor.to(like.device)


def _alpha_bar(config: DiffusionConfig) -> Tensor:
    """Cumulative product of 1 - beta at steps 0 (data) to 1000: (1001,), float64."""
    if config.noise_schedule == "cosine":
        angle = (torch.arange(NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS + 0.008) / 1.008
        bar = (angle * math.pi / 2).cos() ** 2
        beta = (1 - bar[1:] / bar[:-1]).clamp_max(0.999)
    elif config.noise_schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    else:
        beta = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)
    if config.zero_terminal_snr:  # Lin et al. 2024, algorithm 1
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return torch.cat([alpha_bar.new_ones(1), alpha_bar])
