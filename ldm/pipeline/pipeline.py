"""The pipeline: prompts -> guided denoiser -> sampler -> latents -> images."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm import rng
from ldm.diffusion.guidance import GuidanceConfig, inpaint_denoiser
from ldm.diffusion.samplers import SamplerStep, ddim_invert, final_latents, get_sampler
from ldm.diffusion.timesteps import make_timesteps
from ldm.imaging import pil_to_tensor, tensor_to_pil
from ldm.interop.components import ModelComponents
from ldm.io.tensors import same_weights, to_device
from ldm.parts import UNET_PIXELS, images_at_once
from ldm.pipeline.denoiser import PromptDenoiser
from ldm.pipeline.inputs import (
    InitImage,
    consecutive_seeds,
    fit_image,
    initial_noise,
    slerp,
    upright_mask,
    upright_rgb,
)
from ldm.pipeline.load import load_components, load_preview_decoder, save_components
from ldm.precision import DTYPES, Precision, allow_tf32, compile_network, place, resolve_device, resolve_precision
from ldm.text.prompt_weights import strip_weights
from ldm.text.tokenizer import split_words
from ldm.unet import UNet
from ldm.vae import VAE
from ldm.vae.tiling import tiled_decode
from ldm.vae.tiny import TinyDecoder

DEFAULT_GUIDANCE = GuidanceConfig()
FALLBACK_GUIDANCE_SCALE = 7.5  # of models that record none
FALLBACK_STEPS = 30


class Pipeline:
    """A trained model that generates images. The seed of image i is seed + i, and an image depends on nothing else."""

    def __init__(self, components: ModelComponents, path: Path | None = None) -> None:
        self.components, self.path = components, path  # the folder or file that they were read from
        self.unet, self.diffusion, self.vae, self.text, self.resolution, vocabulary, self.metadata = components
        self.vocabulary = frozenset(vocabulary)
        self.vae_factor = self.vae.config.factor if self.vae else 1  # pixels on a side of a latent
        self.factor = self.unet.config.factor * self.vae_factor  # divides the sides of an image, in pixels
        self.guide_unet: UNet | None = None  # for autoguidance
        self._preview_map: Tensor | None = None  # (latent channels + 1, image channels)

    # Model folders.

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device | None = None, precision: Precision | None = None
    ) -> "Pipeline":
        """Read a model: a folder, ours or one of diffusers, or a single CompVis file; see `load_components`.

        It is moved to `device`: the accelerator of this machine, if it has one, when left out. Its networks compute in
        `precision`: bf16 on GPUs that have it, else float32, when left out. Latents stay in float32.
        """
        resolved = resolve_device(device)
        precision = resolve_precision(precision, resolved)
        allow_tf32(resolved)
        return cls(load_components(Path(path)), Path(path)).to(resolved, precision)

    def save(self, folder: str | Path) -> None:
        """Write a model folder that explains itself. ValueError: the networks are in half precision, which rounds."""
        if self.precision != "float32":
            rounded = f"{folder} would have its weights rounded to {self.precision}"
            raise ValueError(f'{rounded}: load the model with precision="float32"')
        save_components(self.components, Path(folder))

    @property
    def default_guidance_scale(self) -> float:
        """The guidance scale of the sample images of the training; 7.5 where the model has none."""
        return self.metadata.get("guidance_scale", FALLBACK_GUIDANCE_SCALE)

    @property
    def default_steps(self) -> int:
        """The sampling steps of the sample images of the training; 30 where the model has none."""
        return self.metadata.get("steps", FALLBACK_STEPS)

    def with_own_interval(self, guidance: GuidanceConfig) -> GuidanceConfig:
        """In the interval of the sample images of the training, unless it has one; 0 to 1 where the model has none."""
        own = self.metadata.get("guidance_interval", (0.0, 1.0))
        return GuidanceConfig(**{"interval": own, **guidance.model_dump(exclude_none=True)})

    def unseen_words(self, prompt: str) -> list[str]:
        """Words of a prompt that no training caption had; none where the captions are unknown."""
        known = self.vocabulary
        return [word for word in split_words(strip_weights(prompt)) if known and word not in known]

    # Networks.

    def to(self, device: str | torch.device, precision: Precision | None = None) -> "Pipeline":
        """Freeze the networks, move them, let them compute in a precision, as they do when left out; returns self."""
        for module in (self.unet, self.vae, self.text, self.guide_unet):
            if module is not None:
                if precision is not None:
                    cast = module.cast if isinstance(module, VAE) else module.to
                    cast(DTYPES[precision])
                place(module.requires_grad_(False).eval(), torch.device(device))
        return self

    def compile(self) -> "Pipeline":
        """Compile U-Nets and decoder, at their first call: slow at first, faster from then on; returns self.

        On a CPU they keep a second copy of their weights, which must not be changed any more.
        """
        for network in (self.unet, self.guide_unet, self.vae and self.vae.decoder):
            if network is not None:
                compile_network(network, frozen=self.device.type == "cpu")
        return self

    @property
    def precision(self) -> Precision:
        """What the U-Net computes in."""
        dtype = self.unet.conv_in.weight.dtype
        return next(name for name, own in DTYPES.items() if own == dtype)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    def set_guide_model(self, guide: "Pipeline") -> "Pipeline":
        """Turn on autoguidance (Karras et al. 2024); ValueError where the guide's diffusion, text or VAE differ."""
        if guide.precision != self.precision:
            raise ValueError(f"guide model {guide.path}: load it in {self.precision}, as {self.path}")
        settings, guide_settings = _inference_settings(self), _inference_settings(guide)
        for name, value in settings.items():
            if value != guide_settings[name] or not same_weights(getattr(self, name), getattr(guide, name)):
                raise ValueError(f"guide model {guide.path}: its {name} differs from {self.path}; pass another one")
        self.guide_unet = guide.unet
        return self.to(self.device)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (b, c, h, w) in [-1, 1] -> standardized latents, each posterior's mean; the identity without a VAE."""
        pixels = pixels.to(self.device)
        if self.vae is None:
            return pixels
        return self.vae.standardize(self._apply_vae(lambda vae, images: vae.encode(images).mean, pixels))

    @torch.no_grad()
    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Standardized latents (b, c, h, w) -> pixels in [-1, 1], by tiles of this side; the identity without a VAE."""
        if self.vae is None:
            return latents.clamp(-1, 1)
        latents = self.vae.unstandardize(latents)
        if tile is None or max(latents.shape[-2:]) <= tile:
            return self._decode_raw(latents).clamp(-1, 1)
        return tiled_decode(self._decode_raw, latents, factor=self.vae_factor, tile=tile).clamp(-1, 1)

    def _decode_raw(self, latents: Tensor) -> Tensor:
        return self._apply_vae(VAE.decode, latents)

    def _apply_vae(self, action: Callable[[VAE, Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Encode or decode (b, c, h, w), those that overflow fp16 in float32, as Stable Diffusion XL's VAE does."""
        assert self.vae is not None
        outputs = action(self.vae, inputs)
        if self.vae.dtype == torch.float16:
            overflowed = ~outputs.isfinite().flatten(1).all(1)
            if overflowed.any():
                warnings.warn("the VAE overflows fp16: these images go through it in float32", stacklevel=2)
                try:
                    outputs[overflowed] = action(self.vae.cast(torch.float32), inputs[overflowed])
                finally:
                    self.vae.cast(torch.float16)  # its weights were rounded before, so these are the same
        return outputs

    @torch.no_grad()
    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Images of standardized latents (b, c, h, w), at little cost.

        A model folder with a `preview.safetensors` (scripts/distill_decoder.py) has a tiny decoder, whose images have
        their whole size. Without one they are small (h x w), and linear in the latents. ValueError: see
        `load_preview_decoder`.
        """
        if self.vae is None:
            return tensor_to_pil(latents)
        if decoder := self._preview_decoder:
            return tensor_to_pil(decoder(latents).clamp(-1, 1))
        return self.linear_preview(latents)

    @cached_property
    def _preview_decoder(self) -> TinyDecoder | None:
        is_folder = self.vae is not None and self.path is not None and self.path.is_dir()
        decoder = load_preview_decoder(self.path, self.vae.config) if is_folder else None  # type: ignore[arg-type, union-attr]
        return decoder.to(self.device) if decoder else None

    def linear_preview(self, latents: Tensor) -> list[Image.Image]:
        """Small images (h x w) of standardized latents (b, c, h, w) of a VAE; 27 dB for the demo."""
        if self._preview_map is None:
            self._preview_map = self._fit_preview_map(latents)
        weight = self._preview_map.to(latents)
        return tensor_to_pil((latents.movedim(1, -1) @ weight[:-1] + weight[-1]).movedim(-1, 1))

    @torch.no_grad()
    def _fit_preview_map(self, latents: Tensor) -> Tensor:
        """Least squares from latents and 1 to average pixels: (latent channels + 1, image channels), float64."""
        noise = torch.randn(64, latents.shape[1], 2, 2, generator=rng.generator(0, "preview"))
        smooth = F.interpolate(noise, scale_factor=4, mode="bilinear").to(latents)
        pixels = F.avg_pool2d(self.decode(smooth), self.vae_factor)
        inputs, outputs = (x.movedim(1, -1).flatten(0, -2).cpu().double() for x in (smooth, pixels))
        return torch.linalg.lstsq(F.pad(inputs, (0, 1), value=1), outputs).solution

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of an image; ValueError when the networks do not support its size in pixels."""
        factor = self.factor
        if width < factor or height < factor or width % factor or height % factor:
            raise ValueError(f"width {width} and height {height} must be multiples of {factor} for this model")
        return self.unet.config.in_channels, height // self.vae_factor, width // self.vae_factor

    # Sampling.

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance: GuidanceConfig = DEFAULT_GUIDANCE,
        sampler: str = "dpmpp_2m",
        eta: float | None = None,
        timesteps: str | Sequence[float] = "trailing",
        seed: int = 0,
        num_images: int = 1,
        width: int | None = None,
        height: int | None = None,
        image: Image.Image | None = None,
        strength: float = 0.75,
        mask: Image.Image | None = None,
        inversion_prompt: str | None = None,
        variation_seed: int | None = None,
        variation_strength: float = 0.1,
        vae_tile: int | None = None,
        on_step: Callable[[int, SamplerStep], bool | None] | None = None,
    ) -> list[Image.Image]:
        """Generate `num_images` images of one prompt with the seeds seed, seed + 1, ...

        Args:
            steps, guidance_scale: the model's own (`default_steps`, `default_guidance_scale`) when left out. A scale of
                1 follows the prompt without guidance; the negative prompt is then not used.
            eta: fresh noise in each step, from 0 (none) to 1; the sampler's own when left out.
            timesteps: the schedule of the steps, by name or as a list of `steps` falling t in (0, 1].
            width, height: in pixels; those of `image_size` when left out.
            image, strength: an image of any size and mode to start from, which is turned upright, put on white, resized
                and cropped about its centre; and how much of it is generated anew, from 0 to 1.
            mask: an image of the same size, for the same crop: white is generated, black stays, clear counts as black.
            inversion_prompt: a prompt that describes `image`: start from the noise of which it is made, not the seed's.
                Euler, and ddim with eta 0, make the image again under that prompt without guidance, and change it under
                another; strength is not used.
            variation_seed, variation_strength: move the initial noise so far, from 0 to 1, towards that of this seed.
            vae_tile: decode latents larger than this side in tiles.
            on_step: called after each step with its index, from 1, and the `SamplerStep`. Where it returns True,
                sampling stops, and the images are what that step predicts.
        ValueError: a setting that is unknown, out of range, not supported by this model, or excluded by another.
        """
        steps = self.default_steps if steps is None else steps
        if image is None and mask is not None:
            raise ValueError(f"mask is {mask.width}x{mask.height}: it needs an image of the same size")
        if self.unet.config.cond_channels and mask is None:
            raise ValueError("this is an inpainting model: pass an image and a mask")
        if image is not None:
            image, mask = self.fit_init_image(image, mask, width, height)
        shape = self.latent_shape(*(image.size if image else self.image_size(width, height)))
        seeds = consecutive_seeds(seed, num_images)
        noise = initial_noise(shape, seeds)
        if variation_seed is not None:
            other = initial_noise(shape, consecutive_seeds(variation_seed, num_images))
            noise = slerp(noise, other, variation_strength)
        if inversion_prompt is not None:
            if image is None or num_images > 1 or variation_seed is not None:
                raise ValueError("inversion_prompt needs an image, num_images 1 and no variation_seed")
            noise, strength = self.invert_image(image, inversion_prompt, steps=steps, timesteps=timesteps), 1.0
        init_image = None
        if image and (inversion_prompt is None or mask):
            init_image = self.prepare_init_image(image, strength, mask)

        latents = noise if init_image is None else init_image.latents.expand_as(noise)  # strength 0 takes no step
        sampling = self.stream(
            noise,
            [prompt] * num_images,
            [negative_prompt] * num_images,
            seeds=seeds,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance=guidance,
            sampler=sampler,
            eta=eta,
            timesteps=timesteps,
            init_image=init_image,
        )
        for index, step in enumerate(sampling, start=1):
            latents = step.z
            if on_step and on_step(index, step):
                latents = step.denoised
                break
        images = tensor_to_pil(self.decode(latents, tile=vae_tile))
        if image is None or mask is None:
            return images
        return [Image.composite(new, image.convert(new.mode), mask) for new in images]

    def fit_init_image(
        self, image: Image.Image, mask: Image.Image | None, width: int | None = None, height: int | None = None
    ) -> tuple[Image.Image, Image.Image | None]:
        """An image, and its mask, as sampling starts from them: upright, opaque, of the width and height."""
        image = upright_rgb(image)
        size = self.image_size(width, height, image)
        return fit_image(image, size), None if mask is None else fit_image(upright_mask(mask, image), size)

    def image_size(
        self, width: int | None = None, height: int | None = None, image: Image.Image | None = None
    ) -> tuple[int, int]:
        """Width and height, in pixels, of the images to generate from an upright image or from noise.

        A side that is left out is that of the training images. With an image, one side that is given keeps its shape,
        and with none it keeps its size where the networks support that and it is shorter than twice the training's.
        """
        own = self.resolution
        if image is None or (width is not None and height is not None):
            return own if width is None else width, own if height is None else height
        if width is not None:
            return width, self._supported_side(width * image.height / image.width)
        if height is not None:
            return self._supported_side(height * image.width / image.height), height
        keeps_size = all(side == self._supported_side(side) and side < 2 * own for side in image.size)
        return image.size if keeps_size else (own, own)

    def is_near_training_size(self, width: int, height: int) -> bool:
        """Whether both sides are longer than half of that of the training images, and shorter than twice."""
        return all(self.resolution < 2 * side and side < 2 * self.resolution for side in (width, height))

    def _supported_side(self, side: float) -> int:
        return max(1, round(side / self.factor)) * self.factor

    def prepare_init_image(self, image: Image.Image, strength: float, mask: Image.Image | None = None) -> InitImage:
        """Encode an image, and a mask of the same size, which is white where the image is generated anew."""
        channels = self.vae.config.image_channels if self.vae else self.unet.config.in_channels
        pixels = pil_to_tensor(image, channels)[None]
        latents = self.encode(pixels)
        if mask is None:
            return InitImage(latents, strength)
        masked = (pil_to_tensor(mask, 1)[None] + 1) / 2
        latent_mask = F.max_pool2d(masked, self.vae_factor).ceil().to(self.device)
        if not self.unet.config.cond_channels:
            return InitImage(latents, strength, mask=latent_mask)
        masked_latents = self.encode(pixels * (masked < 0.5))
        return InitImage(latents, strength, spatial=torch.cat([latent_mask, masked_latents], dim=1))

    @torch.no_grad()
    def invert_image(
        self, image: Image.Image, prompt: str, *, steps: int = 10, timesteps: str | Sequence[float] = "trailing"
    ) -> Tensor:
        """The noise (1, c, h, w) of which euler makes the image again, with this prompt and no guidance.

        Few steps are better: where there is little noise the network is unsure, and each step adds to the error.
        """
        if self.unet.config.cond_channels:
            raise ValueError("an inpainting model cannot invert an image: use one without cond_channels")
        latents = self.prepare_init_image(image, 1.0).latents
        denoiser = self._denoiser(latents, [prompt], [""], None, literal=False).guided(1.0, DEFAULT_GUIDANCE)
        ts = make_timesteps(self.diffusion, steps, timesteps)
        noise = None
        if self.diffusion.config.t_min:  # the network was not trained with less noise than there is at t_min
            noise = initial_noise(tuple(latents.shape[1:]), [0]).to(latents)
        return final_latents(ddim_invert(denoiser, self.diffusion, latents, ts, noise))

    def sample(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance: GuidanceConfig = DEFAULT_GUIDANCE,
        sampler: str = "dpmpp_2m",
        literal: bool = False,
    ) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of the training resolution, each with its prompt and seed; see `stream`.

        In parts, see `images_at_once`.
        """
        side, images = self.resolution, []
        size = images_at_once((side, side), UNET_PIXELS)
        for first in range(0, len(seeds), size):
            own = slice(first, first + size)
            sampling = self.stream(
                initial_noise(self.latent_shape(side, side), seeds[own]),
                prompts[own],
                [""] * len(prompts[own]),
                seeds=seeds[own],
                steps=steps,
                guidance_scale=guidance_scale,
                guidance=guidance,
                sampler=sampler,
                literal=literal,
            )
            images.append(self.decode(final_latents(sampling)))
        return torch.cat(images)

    @torch.no_grad()
    def stream(
        self,
        noise: Tensor,
        prompts: list[str],
        negative_prompts: list[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance: GuidanceConfig = DEFAULT_GUIDANCE,
        sampler: str = "dpmpp_2m",
        eta: float | None = None,
        timesteps: str | Sequence[float] = "trailing",
        init_image: InitImage | None = None,
        literal: bool = False,
    ) -> Iterator[SamplerStep]:
        """Denoise a batch (b, c, h, w) of standard normal noise, each item under its own prompt; yields every step.

        The last step's `z` are the standardized latents. An `init_image` of strength s takes the last s of the steps.
        With `literal` the prompts are read as captions in training, brackets, AND and length included. ValueError,
        before the first step: see `__call__`.
        """
        noise = noise.to(self.device)
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        run_sampler = get_sampler(sampler, eta)
        ts = make_timesteps(self.diffusion, self.default_steps if steps is None else steps, timesteps)
        spatial = init_image.spatial if init_image else None
        batch = self._denoiser(noise, prompts, negative_prompts, spatial, literal=literal)
        denoiser, z = batch.guided(scale, self.with_own_interval(guidance)), noise
        if init_image is not None:
            z, ts = init_image.start(noise, ts, self.diffusion)
            if init_image.mask is not None:
                denoiser = inpaint_denoiser(denoiser, init_image.latents, init_image.mask)

        def noise_sampler(index: int) -> Tensor:
            draws = [torch.randn(noise.shape[1:], generator=rng.generator(s, "sampler", index)) for s in seeds]
            return to_device(torch.stack(draws), noise.device)

        return run_sampler(denoiser, self.diffusion, z, ts, noise_sampler=noise_sampler)

    def _denoiser(
        self, like: Tensor, prompts: list[str], negative_prompts: list[str], spatial: Tensor | None, *, literal: bool
    ) -> PromptDenoiser:
        """That of a batch of latents shaped as `like`."""
        height, width = (side * self.vae_factor for side in like.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=like.device)  # of an uncropped image
        networks = (self.unet, self.guide_unet, self.diffusion, self.text)
        return PromptDenoiser(*networks, prompts, negative_prompts, sizes, spatial, literal)


def _inference_settings(pipeline: Pipeline) -> dict[str, Any]:
    """The configuration of each component, as far as it matters in sampling."""
    return {
        "diffusion": pipeline.diffusion.config.inference_fields(),
        "text": [encoder.config.fingerprint() for encoder in pipeline.text.encoders] if pipeline.text else None,
        "vae": pipeline.vae.config if pipeline.vae else None,
    }
