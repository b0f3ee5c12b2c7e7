"""Timestep schedules: the t at which a sampler calls the network, steps + 1 falling numbers that end in 0, float64."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.process import NUM_TRAIN_TIMESTEPS, Diffusion


def trailing(diffusion: Diffusion, steps: int) -> Tensor:
    """Evenly from 1 to 0: the whole range, whatever the number of steps (Lin et al. 2024, table 2)."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def leading(diffusion: Diffusion, steps: int) -> Tensor:
    """Every floor(1000 / N)th discrete step, from the second, as Stable Diffusion has it. It leaves out t = 1."""
    if not diffusion.discrete or diffusion.config.zero_terminal_snr:
        reason = "zero terminal SNR" if diffusion.discrete else f"noise_schedule {diffusion.config.noise_schedule}"
        raise ValueError(f"timesteps leading never reaches t = 1, which {reason} needs: choose trailing")
    if steps >= NUM_TRAIN_TIMESTEPS:  # its offset of one step leaves no room for the last
        raise ValueError(f"timesteps leading has at most {NUM_TRAIN_TIMESTEPS - 1} steps, not {steps}: choose trailing")
    index = torch.arange(steps, dtype=torch.float64).flip(0) * (NUM_TRAIN_TIMESTEPS // steps) + 1
    return _append_zero((index + 1) / NUM_TRAIN_TIMESTEPS)


def linspace(diffusion: Diffusion, steps: int) -> Tensor:
    """Evenly from 1 to the least noise of the training, then 0."""
    return _append_zero(torch.linspace(1, diffusion.least_t, steps, dtype=torch.float64))


def karras(diffusion: Diffusion, steps: int, *, rho: float = 7) -> Tensor:
    """Evenly in the 7th root of sigma / alpha (Karras et al. 2022, equation 5)."""
    high, low = _noise_range(diffusion, "karras")
    roots = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64)
    return _append_zero(diffusion.t_from_noise_to_signal(roots**rho))


def exponential(diffusion: Diffusion, steps: int) -> Tensor:
    """Evenly in the logarithm of sigma / alpha, so in log-SNR (Lu et al. 2022, section 5)."""
    high, low = _noise_range(diffusion, "exponential and log_snr")
    levels = torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp()
    return _append_zero(diffusion.t_from_noise_to_signal(levels))


def beta(diffusion: Diffusion, steps: int, *, shape: float = 0.6) -> Tensor:
    """Quantiles of the Beta(0.6, 0.6) distribution: dense at both ends (Lee et al. 2024)."""
    angle = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    density = (angle.sin() * angle.cos()) ** (2 * shape - 1)  # of the angle, where t is its sine squared
    cdf = torch.cumulative_trapezoid(density, angle)
    cdf = torch.cat([cdf.new_zeros(1), cdf / cdf[-1]])
    quantile = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    above = torch.searchsorted(cdf, quantile).clamp(1, len(cdf) - 1)
    fraction = (quantile - cdf[above - 1]) / (cdf[above] - cdf[above - 1])
    return torch.lerp(angle[above - 1], angle[above], fraction).sin() ** 2


SCHEDULES: dict[str, Callable[[Diffusion, int], Tensor]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
    "log_snr": exponential,
    "beta": beta,
}


def make_timesteps(diffusion: Diffusion, steps: int, timesteps: str | Sequence[float] = "trailing") -> Tensor:
    """(steps + 1,) falling t that end in 0, float64: a schedule by name, or a list of `steps` numbers.

    Where the diffusion has a t_min, a schedule goes to it, and from there to 0.
    ValueError: no step, an unknown schedule, one that the noise schedule does not allow, t that do not fall in (0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if isinstance(timesteps, str):
        if timesteps not in SCHEDULES:
            raise ValueError(f"timesteps {timesteps!r} is unknown: choose one of {', '.join(SCHEDULES)}")
        return _end_at(diffusion.config.t_min, SCHEDULES[timesteps](diffusion, steps))
    ts = torch.tensor(list(timesteps), dtype=torch.float64)
    if len(ts) != steps:
        raise ValueError(f"expected {steps} timesteps, one for each step, got {len(ts)}")
    if not ((ts > 0) & (ts <= 1)).all() or not (ts.diff() < 0).all():
        raise ValueError("timesteps must fall and lie in (0, 1]: the last step to 0 is added")
    if ts[-1] < diffusion.config.t_min:
        least = f"t_min {diffusion.config.t_min:g}"
        raise ValueError(f"timesteps must not be below {least}, where the model was not trained: end at it")
    return _append_zero(ts)


def _noise_range(diffusion: Diffusion, name: str) -> tuple[float, float]:
    """sigma / alpha at t = 1 and at the least t."""
    high, low = (
        diffusion.noise_to_signal(torch.tensor(t, dtype=torch.float64)).item() for t in (1.0, diffusion.least_t)
    )
    if math.isinf(high):
        raise ValueError(f"timesteps {name}: sigma / alpha is infinite at t = 1 here: choose trailing")
    return high, low


def _end_at(t_min: float, ts: Tensor) -> Tensor:
    """Stretch the t before the last, which is 0, so that they reach from the first to a t_min that is configured."""
    first, least = ts[0], ts[-2]
    if not t_min or first == least:
        return ts
    return _append_zero(torch.lerp(torch.full_like(ts[:-1], t_min), first, (ts[:-1] - least) / (first - least)))


def _append_zero(ts: Tensor) -> Tensor:
    return torch.cat([ts, ts.new_zeros(1)])
