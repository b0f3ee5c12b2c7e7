"""Data whose diffusion is known exactly, to measure samplers against: a mixture of Gaussians on a line."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.process import Diffusion


@dataclass(frozen=True)
class GaussianMixture:
    """Gaussians with these weights, means and deviations; the sum of weights is 1."""

    weights: tuple[float, ...] = (0.3, 0.5, 0.2)
    means: tuple[float, ...] = (-1.2, 0.3, 1.4)
    deviations: tuple[float, ...] = (0.25, 0.4, 0.3)

    def moment(self, order: int) -> float:
        """E[x ** order] for order 1, 2 and 3."""
        raw = {1: lambda m, s: m, 2: lambda m, s: m**2 + s**2, 3: lambda m, s: m**3 + 3 * m * s**2}[order]
        return sum(w * raw(m, s) for w, m, s in zip(self.weights, self.means, self.deviations, strict=True))

    def denoiser(self, process: Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
        """The best Denoiser, E[data | z_t], for z of shape (b, 1) and t of shape (b,)."""

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
            weights, means, deviations = self._tensors(z)
            variance = alpha**2 * deviations**2 + sigma**2
            log_share = weights.log() - 0.5 * variance.log() - 0.5 * (z - alpha * means) ** 2 / variance
            guess = means + alpha * deviations**2 / variance * (z - alpha * means)  # of each Gaussian
            return (log_share.softmax(1) * guess).sum(1, keepdim=True)

        return denoise

    def network(self, process: Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
        """The same Denoiser by way of a network that answers perfectly in terms of the process's prediction."""
        denoise = self.denoiser(process)

        def through(z: Tensor, t: Tensor) -> Tensor:
            data = denoise(z, t)
            noise = (z - process.alpha(t)[:, None] * data) / process.sigma(t)[:, None]
            return process.predict_x0(process.training_target(data, noise, t), z, t)

        return through

    def cdf(self, z: Tensor, process: Diffusion, t: Tensor) -> Tensor:
        """P(z_t <= z): (b, 1)."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        weights, means, deviations = self._tensors(z)
        return (weights * torch.special.ndtr((z - alpha * means) / (alpha**2 * deviations**2 + sigma**2).sqrt())).sum(
            1, keepdim=True
        )

    def flow(self, z: Tensor, process: Diffusion, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability flow ODE takes z from time t to s: on a line it keeps every quantile."""
        wanted = self.cdf(z, process, t)
        low, high = torch.full_like(z, -20), torch.full_like(z, 20)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, process, s) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, means, deviations = (like.new_tensor(v) for v in (self.weights, self.means, self.deviations))
        return weights, means, deviations
