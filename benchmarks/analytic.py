"""One-dimensional data whose diffusion is known exactly, to measure samplers against: a mixture of Gaussians."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.process import Diffusion


@dataclass(frozen=True)
class GaussianMixture:
    """Gaussians with these weights, which sum to 1, means and standard deviations."""

    weights: tuple[float, ...] = (0.3, 0.5, 0.2)
    means: tuple[float, ...] = (-1.2, 0.3, 1.4)
    stds: tuple[float, ...] = (0.25, 0.4, 0.3)

    def moment(self, order: int) -> float:
        """E[x ** order] for order 1, 2 and 3."""
        raw = {1: lambda m, s: m, 2: lambda m, s: m**2 + s**2, 3: lambda m, s: m**3 + 3 * m * s**2}[order]
        return sum(w * raw(m, s) for w, m, s in zip(self.weights, self.means, self.stds, strict=True))

    def denoiser(self, diffusion: Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
        """The best Denoiser, E[x0 | z_t], for z_t (b, 1) and t (b,)."""

        def denoise(z_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = diffusion.alpha(t)[:, None], diffusion.sigma(t)[:, None]
            weights, means, stds = self._tensors(z_t)
            variance = alpha**2 * stds**2 + sigma**2
            log_posterior = weights.log() - 0.5 * variance.log() - 0.5 * (z_t - alpha * means) ** 2 / variance
            denoised = means + alpha * stds**2 / variance * (z_t - alpha * means)  # of each Gaussian
            return (log_posterior.softmax(1) * denoised).sum(1, keepdim=True)

        return denoise

    def network_denoiser(self, diffusion: Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
        """The same Denoiser by way of a perfect network, which predicts what the diffusion's `prediction` says."""
        denoise = self.denoiser(diffusion)

        def network(z_t: Tensor, t: Tensor) -> Tensor:
            x0 = denoise(z_t, t)
            noise = (z_t - diffusion.alpha(t)[:, None] * x0) / diffusion.sigma(t)[:, None]
            return diffusion.training_target(x0, noise, t)

        return diffusion.denoiser(network)

    def cdf(self, z_t: Tensor, diffusion: Diffusion, t: Tensor) -> Tensor:
        """P(z <= z_t) at t, (b, 1)."""
        alpha, sigma = diffusion.alpha(t), diffusion.sigma(t)
        weights, means, stds = self._tensors(z_t)
        each = torch.special.ndtr((z_t - alpha * means) / (alpha**2 * stds**2 + sigma**2).sqrt())
        return (weights * each).sum(1, keepdim=True)

    def flow(self, z_t: Tensor, diffusion: Diffusion, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability flow ODE takes z_t (b, 1) from t to s: in one dimension it keeps every quantile."""
        quantile = self.cdf(z_t, diffusion, t)
        low, high = torch.full_like(z_t, -20), torch.full_like(z_t, 20)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, diffusion, s) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _tensors(self, like: Tensor) -> list[Tensor]:
        return [like.new_tensor(values) for values in (self.weights, self.means, self.stds)]
