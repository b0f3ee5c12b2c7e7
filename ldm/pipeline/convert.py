"""What the command convert does: one model format into another, read back and compared."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from PIL import Image
from tyro.conf import Positional

from ldm.cli import ScriptConfig
from ldm.interop import compvis, diffusers
from ldm.io.atomic import check_folder
from ldm.pipeline.load import load_components, save_components
from ldm.pipeline.pipeline import Pipeline

MAX_PIXEL_DIFFERENCE = 2  # of 255
WRITERS = {"ldm": save_components, "diffusers": diffusers.write, "compvis": compvis.write}


class ConvertConfig(ScriptConfig):
    """Settings of convert."""

    source: Positional[Path] = Path()
    """our model folder, a diffusers folder, or a single file: .safetensors, or .ckpt, which is read without its code"""
    target: Positional[Path] = Path()
    """folder or file to write; it must not exist"""
    format: Literal["ldm", "diffusers", "compvis"] = "ldm"
    use_ema: bool = False
    """read the averaged weights of a single file"""


def convert(config: ConvertConfig) -> None:
    """Write, read back and compare."""
    if Path() in (config.source, config.target):
        raise ValueError("pass a model and where to write it: `python scripts/convert.py IN OUT --format diffusers`")
    if config.target.exists():
        raise ValueError(f"{config.target} exists: remove it, or choose another name")
    check_folder(config.target.parent, "OUT")
    if config.source.is_file():
        components = compvis.read(config.source, ema=config.use_ema, pickles=True)
    else:
        components = load_components(config.source)
    print(f"{config.source}: {components.description}")
    with TemporaryDirectory(prefix=".writing-", dir=config.target.parent) as folder:
        written = Path(folder) / config.target.name
        WRITERS[config.format](components, written)
        difference = compare(Pipeline(components).to("cpu"), Pipeline.load(written, device="cpu"))
        if difference > MAX_PIXEL_DIFFERENCE:
            reason = f"read back as {config.format}, its pixels differ by {difference:g} of 255"
            raise ValueError(f"{config.source} generates another image: {reason}, so nothing was written")
        written.rename(config.target)
    print(f"{config.target}: written as {config.format}, read back; the same image differs by {difference:g} of 255")


def compare(one: Pipeline, other: Pipeline) -> float:
    """Largest pixel difference in a small image of the same seed."""
    side = 8 * one.unet.config.factor * one.vae_factor
    call: dict[str, Any] = {"steps": 2, "sampler": "ddim", "seed": 0, "width": side, "height": side}
    if one.unet.config.cond_channels:
        call |= {"image": Image.new("RGB", (side, side), "red"), "mask": Image.new("L", (side, side), "white")}
    a, b = (np.asarray(p("a cat astronaut", **call)[0], dtype=np.float64) for p in (one, other))
    return float(abs(a - b).max())
