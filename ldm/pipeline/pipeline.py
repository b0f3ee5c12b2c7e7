"""Prompt -> context -> guided denoiser -> sampler -> decoded image."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import rng
from ldm.config import Config
from ldm.data import DataConfig
from ldm.diffusion.guidance import (
    CondUncondFn,
    Denoiser,
    GuidanceConfig,
    autoguidance_pair,
    batched_cond_uncond,
    cfg,
    composable_diffusion,
    guidance_interval,
    guided_denoiser,
    inpaint_denoiser,
)
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.diffusion.samplers import SamplerStep, ddim_invert, final_latents, get_sampler
from ldm.diffusion.timesteps import make_timesteps
from ldm.interop import compvis, diffusers
from ldm.interop.components import ModelComponents
from ldm.io import model_dir
from ldm.io.atomic import write_text
from ldm.io.model_dir import latest_model
from ldm.io.tensors import load_weights, save_weights, sha256
from ldm.text import Text, TextConfig, TextEmbeddings, TextEncoder, combine_encoders
from ldm.text.prompt_weights import WeightedText, split_and, strip_weights
from ldm.text.tokenizer import tokenizer_hash
from ldm.unet import CachedContext, UNet, UNetConfig
from ldm.vae import VAE, VAEConfig
from ldm.vae.tiling import tiled_decode

OnStep = Callable[[int, SamplerStep], None]
DEFAULT_GUIDANCE = GuidanceConfig()


class PipelineManifest(Config):
    """The model.json of a pipeline."""

    resolution: int
    metadata: dict[str, Any]
    null_prompt: Literal[""]
    diffusion: DiffusionConfig
    unet: UNetConfig
    vae: VAEConfig | None
    vae_sha256: str | None
    text: TextConfig | None
    second_text: TextConfig | None = None


class VAEManifest(Config):
    """The model.json of a VAE."""

    data: dict[str, Any]
    vae: VAEConfig
    vae_sha256: str


class InitImage(NamedTuple):
    """What painting starts from, instead of noise alone."""

    latents: Tensor  # (1, c, h, w), standardized
    strength: float  # share of the way that is walked: 0 changes nothing, 1 everything
    mask: Tensor | None  # (1, 1, h, w), 1 where it is painted, 0 where the source stays
    concat_cond: Tensor | None  # (1, 1 + c, h, w), the mask and the latents around it, for networks that look at them


class Pipeline:
    """A trained model, ready to paint. The seed of image i is seed + i, and an image depends on nothing else."""

    def __init__(
        self,
        unet: UNet,
        diffusion: Diffusion,
        *,
        vae: VAE | None,
        text: Text | None,
        resolution: int,
        vocabulary: list[str],
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.unet, self.diffusion, self.vae, self.text = unet, diffusion, vae, text
        self.resolution = resolution  # side of the training images
        self.vocabulary = frozenset(vocabulary)  # of the training captions
        self.metadata = metadata or {}  # what else the model folder tells: the data, the guidance that suits the model
        self.folder: Path | None = None
        self.description = "a model of ldm"  # in words; of a foreign one, what its keys and shapes tell
        self._linear: Tensor | None = None  # latents and 1 -> pixels, for previews
        self.guide_unet: UNet | None = None  # for autoguidance: another network for the same text, latents and process

    # Folders.

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> "Pipeline":
        """Read a model: a folder, ours or one of diffusers, or a single CompVis file.

        ValueError when it is none, not whole, or its VAE is not the one of the training.
        """
        folder = Path(folder)
        if not folder.exists():
            raise ValueError(f"{folder} does not exist: name a model folder, a diffusers folder or a single file")
        if folder.is_file() or diffusers.is_folder(folder):
            parts = compvis.read(folder) if folder.is_file() else diffusers.read(folder)
            return cls.from_components(parts, folder).to(device)
        card = model_dir.read_manifest(folder, "pipeline", PipelineManifest)
        vae = load_vae_weights(card.vae, folder / "vae.safetensors") if card.vae else None
        if vae is not None and sha256(folder / "vae.safetensors") != card.vae_sha256:
            raise ValueError(
                f"{folder}/vae.safetensors is not the VAE that this U-Net was trained on: put that one back"
            )
        with torch.device("meta"):
            unet = UNet(card.unet)
        load_weights(unet, folder / "unet.safetensors")
        pipeline = cls(
            unet,
            Diffusion(card.diffusion),
            vae=vae,
            text=_load_text(card, folder),
            resolution=card.resolution,
            vocabulary=model_dir.read_text(folder / "words.txt").split(),
            metadata=card.metadata,
        )
        pipeline.folder = folder
        return pipeline.to(device)

    @classmethod
    def from_components(cls, parts: ModelComponents, source: Path) -> "Pipeline":
        """A pipeline of the parts that were read from another format."""
        pipeline = cls(parts.unet, parts.process, vae=parts.vae, text=parts.text, resolution=parts.size, vocabulary=[])
        pipeline.folder, pipeline.description = source, parts.description
        return pipeline.to("cpu")

    def save(self, folder: str | Path) -> None:
        """Write a model folder that explains itself."""
        folder = Path(folder)
        save_weights(self.unet, folder / "unet.safetensors")
        write_text(folder / "words.txt", "\n".join(sorted(self.vocabulary)))
        names = ("text", "second_text")
        texts = {
            name: encoder.config.to_dict() | {"model": encoder.save(folder / name)}
            for name, encoder in zip(names, self.text.encoders if self.text else (), strict=False)
        }
        values = {
            "resolution": self.resolution,
            "metadata": self.metadata,
            "null_prompt": "",
            "diffusion": self.diffusion.config.to_dict(),
            "unet": self.unet.config.to_dict(),
            "vae": self.vae and self.vae.config.to_dict(),
            "vae_sha256": self.vae and save_weights(self.vae, folder / "vae.safetensors"),
            "text": None,
            **texts,
        }
        model_dir.write_manifest(folder, "pipeline", values)

    def set_guide_model(self, weaker: "Pipeline") -> "Pipeline":
        """Let a weaker model of the same kind be what guidance goes away from (Karras et al. 2024); returns self.

        ValueError when it has other latents, another text tower or another process.
        """
        for name in ("diffusion", "text", "vae"):
            if _settings_of(getattr(self, name)) != _settings_of(getattr(weaker, name)) or not _same_weights(
                getattr(self, name), getattr(weaker, name)
            ):
                raise ValueError(f"{weaker.folder} can not guide {self.folder}: its {name} is another")
        self.guide_unet = weaker.unet
        return self.to(self.device)

    def to(self, device: str | torch.device) -> "Pipeline":
        """Move the networks and return self."""
        for module in (self.unet, self.vae, self.text, self.guide_unet):
            if module is not None:
                module.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @property
    def weights_file(self) -> Path:
        """The file that the U-Net was read from; of several, the first."""
        assert self.folder is not None, "this pipeline was not loaded"
        if self.folder.is_file():
            return self.folder
        return next(iter(sorted((self.folder / "unet").glob("*.safetensors"))), self.folder / "unet.safetensors")

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    # Painting.

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int = 30,
        guidance_scale: float = 7.5,
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
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Paint `num_images` pictures of one prompt with the seeds seed, seed + 1, ...

        Args:
            guidance_scale: 1 follows the prompt without guidance; the negative prompt is then not used.
            guidance: how the scale is applied.
            eta: fresh noise in each step, from 0 (none) to 1; the sampler's own when left out.
            grid: the times of the steps, by name or as a list of `steps` falling times in (0, 1].
            width, height: in pixels; those of `image`, or of the training images, when left out.
            image: a picture to start from, instead of noise alone.
            strength: how much of `image` is painted anew, from 0 to 1.
            mask: a picture of the same size: what is white there is painted, what is black stays.
            invert: a prompt that describes `image`: start from the noise that makes it, not from the seed's. Euler and
                ddim without eta find the image again under that prompt without guidance, and change it under another;
                strength is not used.
            variation_seed: a second seed; `variation_strength` is how far, from 0 to 1, the first noise goes towards its
                own (slerp).
            tile: decode larger latents in tiles of this side.
            on_step: called after each step with its number, from 1, and the sampler's `Step`.
        ValueError: an unknown sampler or grid, one that the process can not carry, no step, a size that the networks
        can not make or that differs between the pictures, a strength or variation outside 0 to 1, settings that exclude
        each other.
        """
        usual = image.size if image else (self.resolution, self.resolution)
        size = (usual[0] if width is None else width, usual[1] if height is None else height)
        shape = self.latent_shape(*size)
        if image and size != image.size:
            raise ValueError(f"the image is {usual[0]}x{usual[1]}: resize it, or leave out width and height")
        if mask and (image is None or mask.size != size):
            raise ValueError(f"mask is {mask.size[0]}x{mask.size[1]}: it needs an image of the same size")
        if self.unet.config.cond_channels and mask is None:
            raise ValueError("this model paints what a mask covers: name an image and a mask")
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        if not 0 <= seed < 2**62:
            raise ValueError(f"seed must lie between 0 and 2 ** 62, not {seed}")
        seeds = [seed + i for i in range(num_images)]
        noise = initial_noise(shape, seeds)
        if variation_seed is not None:
            other = initial_noise(shape, [variation_seed + i for i in range(num_images)])
            noise = slerp(noise, other, variation_strength)
        noise = noise.to(self.device)
        init_image = None
        if inversion_prompt is not None:
            if image is None or num_images > 1 or variation_seed is not None:
                raise ValueError("invert goes with one image, and makes one picture without a variation")
            noise = self.invert_image(image, inversion_prompt, steps=steps, timesteps=timesteps)
            init_image = self.prepare_init_image(image, 1.0, mask) if mask else None
        elif image:
            init_image = self.prepare_init_image(image, strength, mask)
        result = self.sample(
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
            on_step=on_step,
        )
        painted = tensor_to_pil(self.decode(result, tile=vae_tile))
        if image is None or mask is None:
            return painted
        return [Image.composite(new, image.convert(new.mode), mask.convert("L")) for new in painted]

    def prepare_init_image(self, image: Image.Image, strength: float, mask: Image.Image | None = None) -> InitImage:
        """What `sample` needs of a picture, and of a mask of the same size."""
        factor = self.vae.config.factor if self.vae else 1
        pixels = pil_to_tensor(image, self.vae.config.image_channels if self.vae else self.unet.config.in_channels)
        latents = self.encode(pixels.to(self.device))
        if mask is None:
            return InitImage(latents, strength, None, None)
        covered = (pil_to_tensor(mask, 1) + 1) / 2
        painted = torch.nn.functional.max_pool2d(covered, factor).ceil().to(self.device)
        if not self.unet.config.cond_channels:
            return InitImage(latents, strength, painted, None)
        around = self.encode((pixels * (covered < 0.5)).to(self.device))
        return InitImage(latents, strength, None, torch.cat([painted, around], dim=1))

    @torch.no_grad()
    def invert_image(
        self, image: Image.Image, prompt: str, *, steps: int = 10, timesteps: str | Sequence[float] = "trailing"
    ) -> Tensor:
        """The noise (1, c, h, w) of which `sample` makes the picture again, with euler, this prompt and no guidance.

        The demo's model misses its own reconstruction by 34 dB, whatever the steps. Few are better: the network is
        unsure where there is little noise, and each step there adds to the deviation of the noise that is found.
        """
        if self.unet.config.cond_channels:
            raise ValueError("an inpainting network can not be inverted: take a model without extra channels")
        latents, own_times = (
            self.prepare_init_image(image, 1.0).latents,
            make_timesteps(self.diffusion, steps, timesteps),
        )
        answers = partial(self._make_denoiser, told=None, literal=False, times=own_times)
        denoise = self._guided_denoiser(answers, [prompt], [""], 1.0, DEFAULT_GUIDANCE, literal=False)
        return final_latents(ddim_invert(denoise, self.diffusion, latents, own_times))

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        prompts: list[str],
        negative_prompts: list[str],
        *,
        seeds: list[int],
        steps: int,
        guidance_scale: float,
        guidance: GuidanceConfig = DEFAULT_GUIDANCE,
        sampler: str = "dpmpp_2m",
        eta: float | None = None,
        timesteps: str | Sequence[float] = "trailing",
        init_image: InitImage | None = None,
        literal: bool = False,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Denoise a batch (b, c, h, w) of standard normal noise to standardized latents, each under its own prompt.

        With `literal` the prompts are captions: they are read as in training, brackets, AND and length included.
        """
        walk = get_sampler(sampler, eta)
        own_times = make_timesteps(self.diffusion, steps, timesteps)
        told = init_image.concat_cond if init_image else None
        answers = partial(self._make_denoiser, told=told, literal=literal, times=own_times)
        denoise = self._guided_denoiser(answers, prompts, negative_prompts, guidance_scale, guidance, literal=literal)

        def fresh_noise(number: int) -> Tensor:
            draws = [torch.randn(noise.shape[1:], generator=rng.generator(s, "sampler", number)) for s in seeds]
            return torch.stack(draws).to(noise)

        z = noise
        if init_image is not None:
            if not 0 <= init_image.strength <= 1:
                raise ValueError(f"strength must be between 0 and 1, not {init_image.strength}")
            own_times = own_times[steps - img2img_steps(init_image.strength, steps) :]
            if len(own_times) == 1:
                return init_image.latents.expand_as(noise)
            if init_image.strength < 1 or (init_image.mask is None and init_image.concat_cond is None):
                z = self.diffusion.add_noise(init_image.latents.expand_as(noise), noise, own_times[0])
            if init_image.mask is not None:
                denoise = inpaint_denoiser(denoise, init_image.latents, init_image.mask)
        for number, step in enumerate(walk(denoise, self.diffusion, z, own_times, fresh_noise=fresh_noise), start=1):
            z = step.z
            if on_step:
                on_step(number, step)
        return z

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> standardized latents (the mean of each); the identity without a VAE."""
        return pixels if self.vae is None else self.vae.standardize(self.vae.encode(pixels).mean)

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Small pictures (h x w) of standardized latents while sampling: linear in the latents, so they cost nothing.

        The map is fitted once, to what the decoder makes of smooth noise; 27 dB on the demo's model.
        """
        if self.vae is None:
            return tensor_to_pil(latents)
        if self._linear is None:
            smooth = torch.nn.functional.interpolate(
                torch.randn(64, latents.shape[1], 2, 2, generator=rng.generator(0, "preview")),
                scale_factor=4,
                mode="bilinear",
            ).to(latents)
            pixels = torch.nn.functional.avg_pool2d(self.decode(smooth), self.vae.config.factor)
            inputs, outputs = (x.movedim(1, -1).flatten(0, -2).double().cpu() for x in (smooth, pixels))
            self._linear = torch.linalg.lstsq(torch.nn.functional.pad(inputs, (0, 1), value=1), outputs).solution
        weight = self._linear.to(latents)
        return tensor_to_pil((latents.movedim(1, -1) @ weight[:-1] + weight[-1]).movedim(-1, 1))

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Standardized latents -> pixels in [-1, 1]; the identity without a VAE.

        With `tile` latents larger than that on a side are decoded in tiles, a quarter of which overlaps.
        """
        if self.vae is None:
            return latents.clamp(-1, 1)
        latents, decode = self.vae.unstandardize(latents), self.vae.decode
        if tile is None or max(latents.shape[-2:]) <= tile:
            return decode(latents).clamp(-1, 1)
        factor = self.vae.config.factor
        return tiled_decode(decode, latents, factor=factor, tile=tile, overlap=max(tile // 4, 1)).clamp(-1, 1)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(c, h, w) of what is denoised; ValueError when the networks can not make this size."""
        factor = self.unet.config.factor * (self.vae.config.factor if self.vae else 1)
        if width < factor or height < factor or width % factor or height % factor:
            raise ValueError(f"width {width} and height {height} must be multiples of {factor} for this model")
        scale = self.vae.config.factor if self.vae else 1
        return self.unet.config.in_channels, height // scale, width // scale

    def unseen_words(self, prompt: str) -> list[str]:
        """Words of a prompt that no training caption had; none where a model does not tell its captions."""
        if not self.vocabulary:
            return []
        return [word for word in split_words(strip_weights(prompt)) if word not in self.vocabulary]

    def _guided_denoiser(
        self,
        answers: Callable[[UNet, list[str]], Denoiser],
        prompts: list[str],
        negative: list[str],
        scale: float,
        guidance: GuidanceConfig,
        *,
        literal: bool,
    ) -> Denoiser:
        several = self.text is not None and not literal and any(len(split_and(prompt)) > 1 for prompt in prompts)
        if (guidance.zero_star or guidance.zero_init) and self.diffusion.config.noise_schedule != "flow":
            raise ValueError(
                f"guidance zero_star is for the flow path, this model's is {self.diffusion.config.noise_schedule}"
            )
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be a finite number, not {scale}")

        def alone(unet: UNet) -> Denoiser:
            if several:
                return guided_denoiser(self._composable_pair(answers, unet, prompts, negative), cfg(1.0))
            return answers(unet, prompts)

        if scale == 1 or (self.text is None and self.guide_unet is None):
            return alone(self.unet)
        if self.guide_unet is not None:  # under the negative prompt, where there is one
            other = any(negative) and not several
            pair = autoguidance_pair(
                alone(self.unet), answers(self.guide_unet, negative) if other else alone(self.guide_unet)
            )
        elif several:
            pair = self._composable_pair(answers, self.unet, prompts, negative)
        else:
            pair = batched_cond_uncond(answers(self.unet, prompts + negative))
        guided = guided_denoiser(pair, guidance.build(scale))
        return guided if guidance.interval == (0, 1) else guidance_interval(guidance.interval, guided, alone(self.unet))

    def _composable_pair(
        self, answers: Callable[[UNet, list[str]], Denoiser], unet: UNet, prompts: list[str], negative: list[str]
    ) -> CondUncondFn:
        """Several prompts for each image; where one has fewer than others, empty ones that weigh nothing follow."""
        rounds = list(itertools.zip_longest(*map(split_and, prompts), fillvalue=WeightedText("", 0.0)))
        weights = torch.tensor([[part.weight for part in parts] for parts in rounds], device=self.device)
        texts = [part.text for parts in rounds for part in parts]
        return composable_diffusion(answers(unet, texts + negative), weights)

    def _make_denoiser(
        self, unet: UNet, prompts: list[str], *, told: Tensor | None, literal: bool, times: Tensor
    ) -> Denoiser:
        """The Denoiser of one network under these prompts; `told` is shown to it beside z_t.

        The prompts and the `times` of the walk are encoded once, before it.
        """
        states = (self.text(prompts) if literal else self.text.encode_prompts(prompts)) if self.text else None
        context, mask, vector = to_conditioning(self.text, states)
        kept = None if context is None else CachedContext(context)

        def embedded(t: Tensor) -> Tensor:
            return unet.embed_timestep(self.diffusion.network_timestep(t).to(self.device, torch.float32))

        rows = dict(zip(times[:-1].tolist(), embedded(times[:-1])[:, None], strict=True))

        def answer(z_t: Tensor, t: Tensor) -> Tensor:
            time = rows.get(t[0].item())  # some samplers ask between the times, too
            sizes = self._size_cond(z_t) if unet.config.size_embed_dim else None
            seen = z_t if told is None else torch.cat([z_t, told.expand(len(z_t), -1, -1, -1)], dim=1)
            found = unet(seen, embedded(t[:1]) if time is None else time, kept, mask, vector, sizes)
            return self.diffusion.predict_x0(found.to(z_t.dtype), z_t, t)

        return answer

    def _size_cond(self, z: Tensor) -> Tensor:
        """What a picture of this size that was not cut is told to be: (b, 6)."""
        height, width = (side * (self.vae.config.factor if self.vae else 1) for side in z.shape[-2:])
        return torch.tensor([height, width, 0, 0, height, width], device=z.device).expand(len(z), -1)


def img2img_steps(strength: float, steps: int) -> int:
    """How many of the steps change a picture with this strength: any strength above 0 takes one at least."""
    return max(round(steps * strength), int(strength > 0))


def to_conditioning(
    text: Text | None, states: TextEmbeddings | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Context, mask and vector for the U-Net."""
    if text is None or states is None:
        return None, None, None
    return states.hidden_states, states.mask, states.pooled if text.pooled_dim else None


def initial_noise(shape: tuple[int, ...], seeds: list[int]) -> Tensor:
    """The noise that each image starts from, (b, *shape) float32, the same on every device."""
    return torch.cat([torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985) of noises (n, c, h, w), each item by itself, which keeps their norm."""
    if not 0 <= share <= 1:
        raise ValueError(f"a variation goes from 0 to 1 of the way to the other noise, not {share}")
    norms = [x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (a, b)]
    angle = ((a / norms[0]) * (b / norms[1])).flatten(1).sum(1).clamp(-1, 1).acos().reshape(-1, 1, 1, 1)
    if (angle.sin() < 1e-6).any():  # the same noise twice
        return torch.lerp(a, b, share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def pil_to_tensor(image: Image.Image, channels: int) -> Tensor:
    """A picture -> (1, channels, h, w) in [-1, 1]; 1 channel is grey, 3 are red, green and blue."""
    pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")).reshape(*image.size[::-1], -1))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def tensor_to_pil(pixels: Tensor) -> list[Image.Image]:
    """(b, 1 or 3, h, w) in [-1, 1] -> 8-bit pictures."""
    bytes_ = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in bytes_]


def split_words(text: str) -> list[str]:
    """The words of a caption or prompt, in lower case."""
    cleaned = "".join(c if c.isalnum() or c in "'-" else " " for c in text.lower())
    return cleaned.split()


def vocabulary(captions: Iterable[str]) -> list[str]:
    """All words of some captions, in order."""
    return sorted({word for caption in captions for word in split_words(caption)})


def latents_fingerprint(data: DataConfig, seed: int, vae: Path, text: Text) -> dict[str, Any]:
    """What decides the latents of images under a VAE's model folder, and the token ids of their captions."""
    return {
        "data": data.fingerprint(),
        "seed": seed,
        "vae_sha256": sha256(vae / "vae.safetensors"),
        "tokenizer_sha256": tokenizer_hash(text.tokenizer),
    }


def text_fingerprint(text: Text | None) -> dict[str, Any]:
    """What decides the states of captions: weights and settings of each tower."""
    values: dict[str, Any] = {}
    for name, encoder in zip(("", "second_"), text.encoders if text else (), strict=False):
        told = {"text_sha256": sha256(encoder.weights), **encoder.config.fingerprint()}
        values |= {name + key: value for key, value in told.items()}
    return values


def load_text_encoder(towers: Sequence[TextConfig], beside: Path, script: str) -> Text | None:
    """The frozen text tower, or two; None for unconditional diffusion. `latest` is a finished one `beside` the run.

    ValueError when there is none, with the `script` that trains one.
    """
    encoders = []
    for tower in towers:
        latest = tower.model == "latest"
        source = f"local-dir:{latest_model('text tower', beside, script=script)}" if latest else tower.model
        if source != "none":
            encoders.append(TextEncoder.load(tower, model_id=source))
    return combine_encoders(encoders)


def load_vae(folder: Path) -> VAE:
    """The VAE of a finished train_vae run, frozen."""
    return load_vae_weights(model_dir.read_manifest(folder, "vae", VAEManifest).vae, folder / "vae.safetensors")


def load_vae_weights(config: VAEConfig, path: Path) -> VAE:
    """A frozen VAE from its weights file."""
    with torch.device("meta"):
        vae = VAE(config)
    load_weights(vae, path)
    return vae.requires_grad_(False).eval()


def _load_text(card: PipelineManifest, folder: Path) -> Text | None:
    encoders = []
    for config in (card.text, card.second_text):
        if config is not None:
            local = config.model.startswith("local-dir:")
            source = f"local-dir:{folder / config.model.removeprefix('local-dir:')}" if local else config.model
            encoders.append(TextEncoder.load(config, model_id=source))
    return combine_encoders(encoders)


def _settings_of(part: Diffusion | VAE | Text | None) -> list[dict[str, Any]]:
    """The settings that decide how a part of a pipeline works."""
    if part is None:
        return []
    if isinstance(part, Diffusion):
        return [part.config.inference_fields()]
    return [e.config.fingerprint() for e in part.encoders] if isinstance(part, Text) else [part.config.to_dict()]


def _same_weights(one: Diffusion | VAE | Text | None, other: Diffusion | VAE | Text | None) -> bool:
    """Whether two parts have the same weights; those without any have."""
    if not isinstance(one, torch.nn.Module) or not isinstance(other, torch.nn.Module):
        return True
    own, foreign = one.state_dict(), other.state_dict()
    return own.keys() == foreign.keys() and all(torch.equal(own[name].cpu(), foreign[name].cpu()) for name in own)
