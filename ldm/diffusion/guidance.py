"""Guidance: from two answers, one that is wanted and one to go away from, to a Denoiser.

A `Pair` gives both answers, a `Rule` makes one of them; `guide` puts them together and `within` limits the result to an
interval of time. All answers are guesses of the data, so rules and samplers compose, whatever the network predicts.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ldm.config import Config

Denoiser = Callable[[Tensor, Tensor], Tensor]
CondUncondFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z_t, t) -> the answer under the prompt, and the reference: without it, under the negative one, of a weaker model."""
GuidanceFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(answer, reference, z_t, t) -> guided answer."""


class GuidanceConfig(Config):
    """How the scale is applied."""

    method: Literal["cfg", "apg"] = "cfg"
    """the plain rule, or APG, which keeps colours from saturating"""
    zero_star: bool = False
    """fit the reference to the answer first, as CFG-Zero* does; for models on the flow path"""
    zero_init: bool = False
    """move nothing at t = 1, as CFG-Zero* does beside; for the flow path and euler, whose steps do not look back"""
    rescale: float = Field(0.0, ge=0, le=1)
    """share by which the result gets the deviation of the answer without guidance; 0.7 is usual"""
    interval: tuple[float, float] = (0.0, 1.0)
    """times t, from 0 (data) to 1 (noise), between which there is guidance"""
    apg_eta: float = Field(0.0, ge=0, le=1)
    """share of the push along the answer that APG keeps"""
    apg_norm_threshold: float | None = Field(None, gt=0)
    """longest push of APG in an image"""
    apg_momentum: float = Field(0.0, gt=-1, lt=1)
    """what APG takes over of the pushes before; the paper has -0.5"""

    @model_validator(mode="after")
    def _check(self) -> "GuidanceConfig":
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval {low} {high} must rise, within 0 to 1: name the earlier time, near 0, first")
        return self

    def build(self, scale: float) -> "GuidanceFn":
        """A rule for one run of a sampler."""
        rule = cfg(scale)
        if self.method == "apg":
            parallel, radius, momentum = self.apg_eta, self.apg_norm_threshold, self.apg_momentum
            rule = apg(scale, parallel=parallel, radius=radius, momentum=momentum)
        if self.rescale:
            rule = guidance_rescale(rule, self.rescale)
        if self.zero_star:
            rule = cfg_zero_star(rule)
        return zero_init(rule) if self.zero_init else rule


# Pairs.


def batched_cond_uncond(denoiser: Denoiser) -> CondUncondFn:
    """One call with a doubled batch: its first half is answered under the prompt, its second half is the reference."""

    def pair(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        answer, reference = denoiser(torch.cat([z_t, z_t]), torch.cat([t, t])).chunk(2)
        return answer, reference

    return pair


def autoguidance_pair(denoiser: Denoiser, weaker: Denoiser) -> CondUncondFn:
    """The reference is a smaller or less trained model under the same prompt (Karras et al. 2024)."""
    return lambda z_t, t: (denoiser(z_t, t), weaker(z_t, t))


def composable_diffusion(denoiser: Denoiser, weights: Tensor) -> CondUncondFn:
    """Several prompts at once: the reference and the weighted sum of what each prompt adds (Liu et al. 2022, eq. 11).

    `denoiser` is asked for n + 1 batches in one, the last of which is the reference; `weights` is (n, b).
    """

    def pair(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        count = len(weights) + 1
        *answers, reference = denoiser(z_t.repeat(count, *[1] * (z_t.ndim - 1)), t.repeat(count)).chunk(count)
        shape = (-1, *[1] * (z_t.ndim - 1))
        added = [w.to(a).reshape(shape) * (a - reference) for w, a in zip(weights, answers, strict=True)]
        return reference + torch.stack(added).sum(0), reference

    return pair


# Rules.


def cfg(scale: float) -> GuidanceFn:
    """From the reference through the answer and `scale` times as far (Ho and Salimans 2022, equation 6)."""
    return lambda answer, reference, z_t, t: torch.lerp(reference, answer, scale)


def guidance_rescale(rule: GuidanceFn, share: float) -> GuidanceFn:
    """Give the result the deviation of the answer, by this share (Lin et al. 2024, equations 15, 16; of data)."""

    def guided(answer: Tensor, reference: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        result = rule(answer, reference, z_t, t)
        matched = result * _std(answer) / _std(result).clamp_min(1e-12)
        return torch.lerp(result, matched, share)

    return guided


def apg(scale: float, *, parallel: float = 0.0, radius: float | None = None, momentum: float = 0.0) -> GuidanceFn:
    """APG (Sadat et al. 2024, algorithm 1): less of what only makes the answer larger, so that colours do not saturate.

    `parallel` is the share of the push along the answer that is kept, `radius` limits the push's length in an image,
    `momentum` (negative in the paper) adds the pushes of the steps before, so a rule serves one run of a sampler.
    """
    before: Tensor | float = 0.0

    def guided(answer: Tensor, reference: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        nonlocal before
        push = before = answer - reference + momentum * before
        if radius is not None:
            push = push * (radius / _norm(push).clamp_min(1e-12)).clamp_max(1)
        direction = answer / _norm(answer).clamp_min(1e-12)
        along = _dot(push, direction) * direction
        return answer + (scale - 1) * (push - along + parallel * along)

    return guided


def cfg_zero_star(rule: GuidanceFn) -> GuidanceFn:
    """Fit the reference's velocity to the answer's by a factor, then the rule (CFG-Zero*, Fan et al. 2025, eq. 7)."""

    def guided(answer: Tensor, reference: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        wanted, velocity = z_t - answer, z_t - reference  # both times t, on the flow path
        factor = _dot(wanted, velocity) / _dot(velocity, velocity).clamp_min(1e-12)
        return rule(answer, z_t - factor * velocity, z_t, t)

    return guided


def zero_init(rule: GuidanceFn) -> GuidanceFn:
    """No velocity at t = 1, where that of an unsure network is worse than none (Fan et al. 2025, section 4.2)."""
    return lambda answer, reference, z_t, t: z_t if t[0].item() >= 1 else rule(answer, reference, z_t, t)


# Denoisers.


def guided_denoiser(pair: CondUncondFn, rule: GuidanceFn) -> Denoiser:
    """The Denoiser that a rule makes of both answers."""

    def guided(z_t: Tensor, t: Tensor) -> Tensor:
        answer, reference = pair(z_t, t)
        return rule(answer, reference, z_t, t)

    return guided


def guidance_interval(interval: tuple[float, float], guided: Denoiser, plain: Denoiser) -> Denoiser:
    """Guidance at times inside the interval alone, elsewhere the cheaper plain answer (Kynkaanniemi et al. 2024)."""
    low, high = interval
    return lambda z_t, t: (guided if low <= t[0].item() <= high else plain)(z_t, t)


def inpaint_denoiser(denoiser: Denoiser, data: Tensor, mask: Tensor) -> Denoiser:
    """Where `mask` is 0 the data are known: inpainting with any model, sampler and guidance."""
    return lambda z_t, t: torch.lerp(data, denoiser(z_t, t), mask)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each item, kept as (b, 1, ...)."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()


def _std(a: Tensor) -> Tensor:
    return a.std(dim=tuple(range(1, a.ndim)), keepdim=True)
