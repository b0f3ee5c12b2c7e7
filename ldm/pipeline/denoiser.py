"""From prompts to a guided denoiser."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion import guidance as rules
from ldm.diffusion.guidance import CondUncondFn, Denoiser, GuidanceConfig
from ldm.diffusion.process import Diffusion
from ldm.io.tensors import to_device
from ldm.text import TextConditioner, TextEmbeddings
from ldm.text.prompt_weights import WeightedText, split_and
from ldm.unet import UNet


def text_conditioning(text: TextConditioner, embeddings: TextEmbeddings) -> Conditioning:
    """Hidden states, their mask, and the pooled vector of towers whose configuration uses it."""
    return Conditioning(embeddings.hidden_states, embeddings.mask, embeddings.pooled if text.pooled_dim else None)


@dataclass(frozen=True)
class PromptDenoiser:
    """The networks and conditions of one batch, which has one prompt and one negative prompt for each image."""

    unet: UNet
    guide_unet: UNet | None  # for autoguidance
    diffusion: Diffusion
    text: TextConditioner | None
    prompts: list[str]
    negative_prompts: list[str]
    sizes: Tensor  # (1, 6), for networks that are conditioned on them
    spatial: Tensor | None  # (1, cond_channels, h, w)
    literal: bool  # the prompts are captions, read as in training: without weights, and cut at the limit

    def guided(self, scale: float, guidance: GuidanceConfig) -> Denoiser:
        """ValueError: a scale that is not finite, or guidance that the noise schedule does not support."""
        schedule = self.diffusion.config.noise_schedule
        if (guidance.zero_star or guidance.zero_init) and schedule != "flow":
            raise ValueError(f"guidance zero_star and zero_init need noise_schedule flow; this model has {schedule}")
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a finite number, not {scale}")
        if scale == 1 or (self.text is None and self.guide_unet is None):
            return self._unguided(self.unet)
        guided = rules.guided_denoiser(self._cond_uncond(), guidance.build(scale))
        interval = guidance.interval or (0, 1)
        if interval == (0, 1):
            return guided
        return rules.guidance_interval(interval, guided, self._unguided(self.unet))

    def _cond_uncond(self) -> CondUncondFn:
        if self.guide_unet is not None:  # under the negative prompt, where there is one
            negative = any(self.negative_prompts) and not self._is_composed
            guide = self._plain(self.guide_unet, self.negative_prompts) if negative else self._unguided(self.guide_unet)
            return rules.autoguidance_pair(self._unguided(self.unet), guide)
        if self._is_composed:
            return self._composed(self.unet)
        return rules.batched_cond_uncond(self._plain(self.unet, self.prompts + self.negative_prompts))

    def _unguided(self, unet: UNet) -> Denoiser:
        if self._is_composed:
            return rules.guided_denoiser(self._composed(unet), rules.cfg(1.0))
        return self._plain(unet, self.prompts)

    def _composed(self, unet: UNet) -> CondUncondFn:
        """Several prompts for each image; where one has fewer than others, empty prompts of weight 0 follow."""
        rows = list(itertools.zip_longest(*map(split_and, self.prompts), fillvalue=WeightedText("", 0.0)))
        weights = torch.tensor([[part.weight for part in row] for row in rows], device=unet.conv_in.weight.device)
        texts = [part.text for row in rows for part in row]
        return rules.composable_diffusion(self._plain(unet, texts + self.negative_prompts), weights)

    @property
    def _is_composed(self) -> bool:
        return self.text is not None and not self.literal and any(len(split_and(p)) > 1 for p in self.prompts)

    def _plain(self, unet: UNet, prompts: list[str]) -> Denoiser:
        """One network and one prompt for each image; the prompts are encoded here, once for all steps."""
        cond = Conditioning()
        if self.text is not None:
            embeddings = self.text(prompts) if self.literal else self.text.encode_prompts(prompts)
            cond = text_conditioning(self.text, embeddings)
        sizes = self.sizes if unet.config.size_embed_dim else None
        dtype = unet.conv_in.weight.dtype
        cond = replace(cond, sizes=sizes, spatial=self.spatial).cast(dtype).cached()

        @torch.no_grad()
        def network(z_t: Tensor, t: Tensor) -> Tensor:
            timestep = self.diffusion.network_timestep(t[:1]).float()  # all images have one t
            return unet(z_t.to(dtype), to_device(timestep, z_t.device), cond)

        return self.diffusion.denoiser(network)
