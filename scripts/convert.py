"""Turn a model from one format into another, and compare both before saying that it is done."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tyro.conf import Positional

from ldm.cli import ScriptConfig, exit_on_user_error, parse_cli
from ldm.interop import compvis, diffusers
from ldm.interop.components import ModelComponents
from ldm.pipeline import Pipeline


class ConvertConfig(ScriptConfig):
    """Settings of convert."""

    source: Positional[Path] = Path()
    """our model folder, a diffusers folder, or a single file: .safetensors, or .ckpt, which is read without its code"""
    target: Positional[Path] = Path()
    """folder or file to write; it must not be there"""
    format: Literal["ldm", "diffusers", "compvis"] = "ldm"
    use_ema: bool = False
    """take the averaged weights of a single file"""


def convert(config: ConvertConfig) -> float:
    """Write, read back and compare; returns the largest difference of a pixel, of 255."""
    if Path() in (config.source, config.target):
        raise ValueError(
            "name a model and where to write it, as in `python scripts/convert.py IN OUT --format diffusers`"
        )
    if config.target.exists():
        raise ValueError(f"{config.target} is there already: remove it, or choose another name")
    if config.source.is_file():
        pipeline = Pipeline.from_components(
            compvis.read(config.source, ema=config.use_ema, pickles=True), config.source
        )
    else:
        pipeline = Pipeline.load(config.source)
    print(f"{config.source}: {pipeline.description}")
    beside = config.target.with_name(f".writing-{config.target.name}")
    try:
        write(pipeline, beside, config)
        difference = compare(pipeline, Pipeline.load(beside))
        if difference > 2:
            raise ValueError(
                f"{config.source} does not paint the same when it is read back as {config.format}: pixels differ by "
                f"{difference:g} of 255, so nothing was written"
            )
        beside.rename(config.target)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)
    print(f"{config.target}: written as {config.format}, read back; the same picture differs by {difference:g} of 255")
    return difference


def write(pipeline: Pipeline, target: Path, config: ConvertConfig) -> None:
    """Write a pipeline in the format asked for; ValueError when that can not hold it."""
    if config.format == "ldm":
        pipeline.save(target)
    elif pipeline.vae is None or pipeline.text is None:
        raise ValueError(f"{config.source} has no VAE or no text: only our own folders can hold it")
    else:
        parts = ModelComponents(pipeline.unet, pipeline.diffusion, pipeline.vae, pipeline.text, pipeline.resolution)
        (diffusers if config.format == "diffusers" else compvis).write(parts, target)


def compare(one: Pipeline, other: Pipeline) -> float:
    """The largest difference of a pixel in a small picture of the same seed; ValueError when the processes differ."""
    if one.diffusion.config.inference_fields() != other.diffusion.config.inference_fields():
        raise ValueError(f"read back, the process is {other.diffusion.config}, not {one.diffusion.config}")
    side = 8 * one.unet.config.factor * (one.vae.config.factor if one.vae else 1)
    call: dict[str, Any] = {"steps": 2, "sampler": "ddim", "seed": 0, "width": side, "height": side}
    if one.unet.config.cond_channels:
        call |= {"image": Image.new("RGB", (side, side), "red"), "mask": Image.new("L", (side, side), "white")}
    a, b = (np.asarray(p("a cat astronaut", **call)[0], dtype=np.float64) for p in (one, other))
    return float(abs(a - b).max())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(ConvertConfig, argv, default=None, description=__doc__)
    with exit_on_user_error():
        convert(config)


if __name__ == "__main__":
    main()
