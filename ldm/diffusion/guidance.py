"""Guidance: combine a conditional and a reference prediction into one denoiser.

A `CondUncondFn` gives both predictions, a `GuidanceFn` combines them. All are of x0, so guidance composes with every
sampler, whatever the network predicts. Shapes: z_t and predictions are (b, ...), t is (b,).
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ldm.config import Config

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(z_t, t) -> the prediction of x0."""
CondUncondFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z_t, t) -> the prediction under the prompt, and the reference: unconditional, negative, or of a guide model."""
GuidanceFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(cond, uncond, z_t, t) -> the guided prediction."""


class GuidanceConfig(Config):
    """How the guidance scale is applied."""

    method: Literal["cfg", "apg"] = "cfg"
    """classifier-free guidance, or APG, which keeps colours from saturating"""
    zero_star: bool = False
    """first fit the unconditional velocity to the conditional one (CFG-Zero*); for the flow schedule"""
    zero_init: bool = False
    """keep z as it is at t = 1 (CFG-Zero*); for the flow schedule and euler, which uses no earlier prediction"""
    rescale: float = Field(0.0, ge=0, le=1)
    """how far to rescale the result to the standard deviation of the conditional prediction; 0.7 is usual"""
    interval: tuple[float, float] | None = None
    """lowest and highest t, from 0 (data) to 1 (noise), at which guidance is used; elsewhere the scale is 1. The
    model's own when left out, 0 1 where it has none"""
    apg_eta: float = Field(0.0, ge=0, le=1)
    """APG: weight of the part of the update parallel to the conditional prediction"""
    apg_norm_threshold: float | None = Field(None, gt=0, allow_inf_nan=False)
    """APG: largest norm of the update of an image"""
    apg_momentum: float = Field(0.0, gt=-1, lt=1)
    """APG: weight of the previous updates; -0.5 in the paper"""

    @model_validator(mode="after")
    def _check(self) -> "GuidanceConfig":
        low, high = self.interval or (0, 1)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval {low} {high} must rise, within 0 to 1: pass the lower t first")
        return self

    def build(self, scale: float) -> GuidanceFn:
        """The function for one run of a sampler: APG's momentum belongs to the run."""
        guidance = cfg(scale)
        if self.method == "apg":
            guidance = APG(scale, eta=self.apg_eta, norm_threshold=self.apg_norm_threshold, momentum=self.apg_momentum)
        if self.rescale:
            guidance = guidance_rescale(guidance, self.rescale)
        if self.zero_star:
            guidance = cfg_zero_star(guidance)
        return zero_init(guidance) if self.zero_init else guidance


# Where the two predictions come from.


def batched_cond_uncond(denoiser: Denoiser) -> CondUncondFn:
    """One call with a doubled batch, whose second half the denoiser conditions on the negative prompt."""

    def cond_uncond(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        cond, uncond = denoiser(torch.cat([z_t, z_t]), torch.cat([t, t])).chunk(2)
        return cond, uncond

    return cond_uncond


def autoguidance_pair(denoiser: Denoiser, guide: Denoiser) -> CondUncondFn:
    """The reference is a smaller or less trained model under the same prompt (Karras et al. 2024)."""
    return lambda z_t, t: (denoiser(z_t, t), guide(z_t, t))


def composable_diffusion(denoiser: Denoiser, weights: Tensor) -> CondUncondFn:
    """Several prompts at once: the reference plus the weighted sum of their differences (Liu et al. 2022, eq. 11).

    `denoiser` gets n + 1 copies of the batch, the last of which is the reference; `weights` is (n, b).
    """

    def cond_uncond(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        count, ones = len(weights) + 1, [1] * (z_t.ndim - 1)
        *conds, uncond = denoiser(z_t.repeat(count, *ones), t.repeat(count)).chunk(count)
        added = [w.to(c).reshape(-1, *ones) * (c - uncond) for w, c in zip(weights, conds, strict=True)]
        return uncond + torch.stack(added).sum(0), uncond

    return cond_uncond


# How they are combined.


def cfg(scale: float) -> GuidanceFn:
    """Classifier-free guidance, uncond + scale (cond - uncond) (Ho and Salimans 2022, equation 6)."""
    return lambda cond, uncond, z_t, t: torch.lerp(uncond, cond, scale)


def guidance_rescale(guidance: GuidanceFn, phi: float) -> GuidanceFn:
    """Rescale to the standard deviation of cond, by the share phi (Lin et al. 2024, equations 15 and 16; of x0)."""

    def rescaled(cond: Tensor, uncond: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        guided = guidance(cond, uncond, z_t, t)
        matched = guided * _std(cond) / _std(guided).clamp_min(1e-12)
        return torch.lerp(guided, matched, phi)

    return rescaled


class APG:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1): a GuidanceFn that keeps colours from saturating.

    `eta` weighs the part of the update cond - uncond that is parallel to cond; `norm_threshold` limits its norm in each
    image; `momentum` weighs the previous updates, which the instance holds: it serves one run of a sampler.
    """

    def __init__(
        self, scale: float, *, eta: float = 0.0, norm_threshold: float | None = None, momentum: float = 0.0
    ) -> None:
        self.scale, self.eta, self.norm_threshold, self.momentum = scale, eta, norm_threshold, momentum
        self.running_update: Tensor | float = 0.0

    def __call__(self, cond: Tensor, uncond: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        update = self.running_update = cond - uncond + self.momentum * self.running_update
        if self.norm_threshold is not None:
            update = update * (self.norm_threshold / _norm(update).clamp_min(1e-12)).clamp_max(1)
        direction = cond / _norm(cond).clamp_min(1e-12)
        parallel = _dot(update, direction) * direction
        return cond + (self.scale - 1) * (update - parallel + self.eta * parallel)


def cfg_zero_star(guidance: GuidanceFn) -> GuidanceFn:
    """CFG-Zero* (Fan et al. 2025, eq. 7): first scale the velocity of uncond to fit that of cond."""

    def optimized(cond: Tensor, uncond: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        v_cond, v_uncond = z_t - cond, z_t - uncond  # t times the velocities of the flow schedule
        scale = _dot(v_cond, v_uncond) / _dot(v_uncond, v_uncond).clamp_min(1e-12)
        return guidance(cond, z_t - scale * v_uncond, z_t, t)

    return optimized


def zero_init(guidance: GuidanceFn) -> GuidanceFn:
    """No velocity at t = 1, where that of an undertrained network is worse than none (Fan et al. 2025, section 4.2)."""
    return lambda cond, uncond, z_t, t: z_t if t[0].item() >= 1 else guidance(cond, uncond, z_t, t)


# Denoisers.


def guided_denoiser(cond_uncond: CondUncondFn, guidance: GuidanceFn) -> Denoiser:
    """The Denoiser that combines both predictions."""
    return lambda z_t, t: guidance(*cond_uncond(z_t, t), z_t, t)


def guidance_interval(interval: tuple[float, float], guided: Denoiser, unguided: Denoiser) -> Denoiser:
    """Guidance at t inside the interval, elsewhere the cheaper unguided denoiser (Kynkaanniemi et al. 2024)."""
    low, high = interval
    return lambda z_t, t: (guided if low <= t[0].item() <= high else unguided)(z_t, t)


def inpaint_denoiser(denoiser: Denoiser, x0: Tensor, mask: Tensor) -> Denoiser:
    """Where `mask` is 0, x0 is known: inpainting with any model, sampler and guidance. All broadcast to (b, ...)."""
    return lambda z_t, t: torch.lerp(x0, denoiser(z_t, t), mask)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of each item, as (b, 1, ...)."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()


def _std(a: Tensor) -> Tensor:
    return a.std(dim=tuple(range(1, a.ndim)), keepdim=True)
