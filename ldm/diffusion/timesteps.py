"""Time grids: at which times a sampler asks the network. Each is data: N + 1 falling times that end in 0."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.process import NUM_TRAIN_TIMESTEPS, Diffusion


def trailing(process: Diffusion, steps: int) -> Tensor:
    """Evenly from 1 to 0: the whole path, whatever the number of steps (Lin et al. 2024, table 2)."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def leading(process: Diffusion, steps: int) -> Tensor:
    """Every floor(1000 / N)th discrete step, from the second: Stable Diffusion's own. It leaves out t = 1."""
    if not process.discrete:
        raise ValueError("grid leading starts short of t = 1, where a continuous path has its noise: choose trailing")
    if process.config.zero_terminal_snr:
        raise ValueError(
            "grid leading starts short of t = 1, where this path has its zero terminal SNR: choose trailing"
        )
    if steps >= NUM_TRAIN_TIMESTEPS:  # its offset of one step leaves no room for the last
        raise ValueError(f"grid leading has at most {NUM_TRAIN_TIMESTEPS - 1} steps, not {steps}: choose trailing")
    index = torch.arange(steps, dtype=torch.float64).flip(0) * (NUM_TRAIN_TIMESTEPS // steps) + 1
    return _append_zero((index + 1) / NUM_TRAIN_TIMESTEPS)


def linspace(process: Diffusion, steps: int) -> Tensor:
    """Evenly from 1 to the least noise that training saw, then 0."""
    return _append_zero(torch.linspace(1, process.t_min, steps, dtype=torch.float64))


def karras(process: Diffusion, steps: int, *, rho: float = 7) -> Tensor:
    """Evenly in the 7th root of sigma / alpha (Karras et al. 2022, equation 5)."""
    high, low = _noise_range(process, "karras")
    roots = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64)
    return _append_zero(process.t_from_noise_to_signal(roots**rho))


def exponential(process: Diffusion, steps: int) -> Tensor:
    """Evenly in the logarithm of sigma / alpha, so in log SNR (Lu et al. 2022, section 5)."""
    high, low = _noise_range(process, "exponential and log_snr")
    return _append_zero(
        process.t_from_noise_to_signal(torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp())
    )


def beta(process: Diffusion, steps: int, *, shape: float = 0.6) -> Tensor:
    """Quantiles of the Beta(0.6, 0.6) distribution: dense at both ends (Lee et al. 2024)."""
    angle = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    density = (angle.sin() * angle.cos()) ** (2 * shape - 1)  # of the angle, where the time is its sine squared
    share = torch.cumulative_trapezoid(density, angle)
    share = torch.cat([share.new_zeros(1), share / share[-1]])
    wanted = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    above = torch.searchsorted(share, wanted).clamp(1, len(share) - 1)
    place = (wanted - share[above - 1]) / (share[above] - share[above - 1])
    return torch.lerp(angle[above - 1], angle[above], place).sin() ** 2


SCHEDULES: dict[str, Callable[[Diffusion, int], Tensor]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "exponential": exponential,
    "log_snr": exponential,
    "beta": beta,
}


def make_timesteps(process: Diffusion, steps: int, grid: str | Sequence[float] = "trailing") -> Tensor:
    """`steps` + 1 falling times that end in 0, float64: a grid by name, or a list of `steps` times of one's own.

    ValueError: no step, an unknown grid, one that the process cannot carry, times that do not fall within (0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if isinstance(grid, str):
        if grid not in SCHEDULES:
            raise ValueError(f"grid {grid!r} is unknown: choose one of {', '.join(SCHEDULES)}")
        return SCHEDULES[grid](process, steps)
    own = torch.tensor(list(grid), dtype=torch.float64)
    if len(own) != steps:
        raise ValueError(f"{steps} steps need as many times, not {len(own)}")
    if not ((own > 0) & (own <= 1)).all() or not (own.diff() < 0).all():
        raise ValueError("the times of a grid must fall, and lie above 0 and at most at 1; the last step to 0 is added")
    return _append_zero(own)


def _noise_range(process: Diffusion, name: str) -> tuple[float, float]:
    """sigma / alpha at t = 1 and at the least time."""
    high, low = (process.noise_to_signal(torch.tensor(t, dtype=torch.float64)).item() for t in (1.0, process.t_min))
    if math.isinf(high):
        raise ValueError(
            f"grid {name}: sigma / alpha has no end where the path has no signal, as here at t = 1: choose trailing"
        )
    return high, low


def _append_zero(times: Tensor) -> Tensor:
    return torch.cat([times, times.new_zeros(1)])
