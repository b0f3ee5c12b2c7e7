"""What the command convert does: a model, or a VAE alone, from one format into another, read back and compared."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tyro.conf import Positional

from ldm.cli import ScriptConfig
from ldm.imaging import tensor_to_pil
from ldm.interop import compvis, diffusers
from ldm.interop.components import ModelComponents
from ldm.io.atomic import check_folder
from ldm.io.pickles import SUFFIXES
from ldm.io.tensors import read_tensors
from ldm.pipeline.load import check_exists, holds_vae_alone, load_components, load_vae, save_components, save_vae
from ldm.pipeline.pipeline import Pipeline
from ldm.text import TextEncoder
from ldm.text.weights import CONVERTED
from ldm.vae import VAE

MAX_PIXEL_DIFFERENCE = 2  # of 255
Writers = dict[str, Callable[[Any, Path], None]]  # by format
WRITERS: Writers = {"ldm": save_components, "diffusers": diffusers.write, "compvis": compvis.write}
VAE_WRITERS: Writers = {
    "ldm": save_vae,
    "diffusers": diffusers.write_vae,
    "compvis": compvis.write_vae,
}


class ConvertConfig(ScriptConfig):
    """Settings of convert."""

    source: Positional[Path] = Path()
    """a whole model or a VAE alone: our model folder, a diffusers folder, or a single file: .safetensors, or a pickle
    (.ckpt, .pt, .pth, .bin), whose code is not run"""
    target: Positional[Path] = Path()
    """folder or file to write; it must not exist"""
    format: Literal["ldm", "diffusers", "compvis"] = "ldm"
    """a folder of ldm, a folder of diffusers, or a single file; the last two hold models of configs/exportable/"""
    use_ema: bool = False
    """read the averaged weights of a single file"""
    precision: Literal["float32", "fp16"] = "float32"
    """of the weights in the files, for --format ldm, which are read back as float32"""
    prune_tokens: bool = False
    """leave out the embeddings of tokens that no word of the training captions has, for --format ldm; a text tower
    that is pruned or in fp16 is stored without the image tower that it was trained with"""

    @property
    def reduces(self) -> bool:
        """Whether the files hold less than the source."""
        return self.prune_tokens or self.precision != "float32"


def convert(config: ConvertConfig) -> None:
    """Write, read back and compare."""
    check_paths(config)
    source, target = open_source(config), config.target
    stored = reduce(open_source(config), config) if config.reduces else source
    what = "a VAE alone" if isinstance(source, VAE) else source.description
    print(f"{config.source}: {what}")
    with TemporaryDirectory(prefix=".writing-", dir=target.parent) as folder:
        written = Path(folder) / target.name
        (VAE_WRITERS if isinstance(source, VAE) else WRITERS)[config.format](stored, written)
        if isinstance(source, VAE):
            difference = compare_vaes(source, load_vae(written))
        else:
            difference = compare(Pipeline(source).to("cpu"), Pipeline.load(written, device="cpu"))
        if difference > MAX_PIXEL_DIFFERENCE:
            reason = f"read back as {config.format}, its pixels differ by {difference:g} of 255"
            remedy = ": leave out --precision fp16" if config.precision == "fp16" else ""
            raise ValueError(f"{config.source} generates another image: {reason}, so nothing was written{remedy}")
        written.rename(target)
    print(f"{target}: written as {config.format}, read back; the same image differs by {difference:g} of 255")


def check_paths(config: ConvertConfig) -> None:
    """ValueError where the command names no source, or a target that cannot be written so."""
    target, suffix = config.target, config.target.suffix.lower()
    if Path() in (config.source, target):
        raise ValueError("pass a model and where to write it: `python scripts/convert.py IN OUT --format diffusers`")
    check_exists(config.source)
    if target.exists():
        raise ValueError(f"{target} exists: remove it, or choose another name")
    if suffix in SUFFIXES:
        raise ValueError(f"{target}: pickles are not written: pass OUT.safetensors with --format compvis, or a folder")
    if suffix == ".safetensors" and config.format != "compvis":
        raise ValueError(f"{target} names a file, and --format {config.format} writes a folder: add --format compvis")
    if config.reduces and config.format != "ldm":
        raise ValueError(f"--precision and --prune-tokens are for --format ldm: leave them out with {config.format}")
    check_folder(target.parent, "OUT")


def open_source(config: ConvertConfig) -> ModelComponents | VAE:
    """The model, or the VAE alone."""
    path = config.source
    if path.is_file():
        tensors = read_tensors(path, pickles=True)
        if compvis.is_vae(tensors):
            return compvis.vae_from_tensors(tensors, path)
        return compvis.components_from_tensors(tensors, path, ema=config.use_ema)
    return load_vae(path) if holds_vae_alone(path) else load_components(path, pickles=True)


def reduce(source: ModelComponents | VAE, config: ConvertConfig) -> ModelComponents | VAE:
    """Prune the text towers of a model that it stores, and make it half precision, as asked for.

    ValueError: it stores no tower, or no words of captions.
    """
    if isinstance(source, VAE):
        networks: list[nn.Module | None] = [source]
        towers: list[TextEncoder] = []
    else:
        towers = [tower for tower in (source.text.encoders if source.text else []) if tower.is_stored]
        networks = [source.unet, source.vae, *towers]
    if config.prune_tokens:
        words = () if isinstance(source, VAE) else source.vocabulary
        if not (towers and words):
            raise ValueError(f"{config.source} holds no text tower with its captions' words: leave out --prune-tokens")
        for tower in towers:
            tower.prune(words)
    if config.precision == "fp16":
        for network in filter(None, networks):
            network.half()
    for tower in towers:
        tower.model_id = CONVERTED  # so that its weights are written, and no file copied
    return source


def compare(one: Pipeline, other: Pipeline) -> float:
    """Largest pixel difference in a small image of the same seed."""
    side = 8 * one.unet.config.factor * one.vae_factor
    call: dict[str, Any] = {"steps": 2, "sampler": "ddim", "seed": 0, "width": side, "height": side}
    if one.unet.config.cond_channels:
        call |= {"image": Image.new("RGB", (side, side), "red"), "mask": Image.new("L", (side, side), "white")}
    prompt = " ".join(sorted(one.vocabulary)[:8]) or "a cat astronaut"  # of words that a pruned tower has
    return largest_difference(*(p(prompt, **call)[0] for p in (one, other)))


@torch.no_grad()
def compare_vaes(one: VAE, other: VAE) -> float:
    """Largest pixel difference of an image through `one`, and through the encoder of one and the decoder of the other.

    The latents between them are standardized, so that their scale counts, too.
    """
    config = one.config
    shape = (1, config.image_channels, 8 * config.factor, 8 * config.factor)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def decode(encoder: VAE, decoder: VAE) -> Image.Image:
        z: Tensor = encoder.standardize(encoder.encode(image).mean)
        return tensor_to_pil(decoder.decode(decoder.unstandardize(z)))[0]

    return max(largest_difference(decode(one, one), decode(*pair)) for pair in ((one, other), (other, one)))


def largest_difference(one: Image.Image, other: Image.Image) -> float:
    """Of a pixel of two images, of 255."""
    a, b = (np.asarray(image, dtype=np.float64) for image in (one, other))
    return float(abs(a - b).max())
