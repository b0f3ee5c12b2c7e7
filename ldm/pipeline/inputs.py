"""What sampling starts from: the noise of seeds, variations between two of them, and images with masks."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.diffusion.process import Diffusion
from ldm.imaging import flatten_alpha
from ldm.io.image_file import orientation_of, turn_upright


class InitImage(NamedTuple):
    """An image that sampling starts from, instead of noise alone."""

    latents: Tensor  # (1, c, h, w), standardized
    strength: float  # share of the steps that are taken: 0 changes nothing, 1 everything
    mask: Tensor | None = None  # (1, 1, h, w), 1 where latents are generated, 0 where those of the image stay
    spatial: Tensor | None = None  # (1, 1 + c, h, w), mask and masked-image latents, for inpainting networks

    def start(self, noise: Tensor, ts: Tensor, diffusion: Diffusion) -> tuple[Tensor, Tensor]:
        """The noised latents that sampling starts from, (b, c, h, w), and the last of `ts` (steps + 1,) from there on.

        At strength 1 under a mask nothing of the image is left in them.
        """
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, not {self.strength}")
        ts = ts[len(ts) - 1 - img2img_steps(self.strength, len(ts) - 1) :]
        if self.strength == 1 and (self.mask is not None or self.spatial is not None):
            return noise, ts
        return diffusion.add_noise(self.latents.expand_as(noise), noise, ts[0]), ts


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image to start from, in mode RGB: upright, and white where it is clear, as in training."""
    return flatten_alpha(turn_upright(image, orientation_of(image.info))).convert("RGB")


def upright_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """The mask of an upright image, in mode L: black, which keeps the image, where it is clear.

    ValueError: it has not the size of the image.
    """
    mask = flatten_alpha(turn_upright(mask, orientation_of(mask.info)), "black").convert("L")
    if mask.size != image.size:
        raise ValueError(
            f"mask is {mask.width}x{mask.height}, the image {image.width}x{image.height}: draw one of the same size"
        )
    return mask


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image or a mask, resized and cropped about its centre to this width and height."""
    if image.size == size:
        return image
    sharp = Image.Resampling.LANCZOS if image.mode == "RGB" else Image.Resampling.BOX  # no ringing around a mask
    return ImageOps.fit(image, size, sharp)


def img2img_steps(strength: float, steps: int) -> int:
    """How many of the steps are taken at this strength: at least one, unless it is 0."""
    return max(round(steps * strength), int(strength > 0))


def initial_noise(shape: tuple[int, ...], seeds: Iterable[int]) -> Tensor:
    """The noise that each image starts from, (b, *shape) float32, the same on every device."""
    return torch.cat([torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def consecutive_seeds(seed: int, count: int) -> range:
    """seed, seed + 1, ... of `count` images; ValueError: no image, or a seed out of range."""
    if count < 1:
        raise ValueError(f"num_images must be at least 1, not {count}")
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed must be between 0 and 2 ** 62, not {seed}")
    return range(seed, seed + count)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985) of noises (b, c, h, w), each item by itself, which keeps their norm."""
    if not 0 <= weight <= 1:
        raise ValueError(f"variation_strength must be between 0 and 1, not {weight}")
    norms = [x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (a, b)]
    angle = ((a / norms[0]) * (b / norms[1])).flatten(1).sum(1).clamp(-1, 1).acos().reshape(-1, 1, 1, 1)
    if (angle.sin() < 1e-6).any():  # the same noise twice
        return torch.lerp(a, b, weight)
    return (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()
