"""Turn a model from one format into another, and compare both before saying that it is done."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tyro.conf import Positional

from ldm.config import ScriptConfig, errors_for_people, parse
from ldm.interop import compvis, diffusers
from ldm.interop.parts import Parts
from ldm.pipeline import Pipeline


class Convert(ScriptConfig):
    """Settings of convert."""

    source: Positional[Path] = Path()
    """our model folder, a diffusers folder, or a single file: .safetensors, or .ckpt, which is read without its code"""
    target: Positional[Path] = Path()
    """folder or file to write; it must not be there"""
    to: Literal["ldm", "diffusers", "compvis"] = "ldm"
    ema: bool = False
    """take the averaged weights of a single file"""


def convert(config: Convert) -> float:
    """Write, read back and compare; returns the largest difference of a pixel, of 255."""
    if Path() in (config.source, config.target):
        raise ValueError("name a model and where to write it, as in `python scripts/convert.py IN OUT --to diffusers`")
    if config.target.exists():
        raise ValueError(f"{config.target} is there already: remove it, or choose another name")
    if config.source.is_file():
        pipeline = Pipeline.of(compvis.read(config.source, ema=config.ema, pickles=True), config.source)
    else:
        pipeline = Pipeline.load(config.source)
    print(f"{config.source}: {pipeline.kind}")
    beside = config.target.with_name(f".writing-{config.target.name}")
    try:
        write(pipeline, beside, config)
        difference = compare(pipeline, Pipeline.load(beside))
        if difference > 2:
            raise ValueError(
                f"{config.source} does not paint the same when it is read back as {config.to}: pixels differ by "
                f"{difference:g} of 255, so nothing was written"
            )
        beside.rename(config.target)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)
    print(f"{config.target}: written as {config.to}, read back; the same picture differs by {difference:g} of 255")
    return difference


def write(pipeline: Pipeline, target: Path, config: Convert) -> None:
    """Write a pipeline in the format asked for; ValueError when that can not hold it."""
    if config.to == "ldm":
        pipeline.save(target)
    elif pipeline.vae is None or pipeline.text is None:
        raise ValueError(f"{config.source} has no VAE or no text: only our own folders can hold it")
    else:
        parts = Parts(pipeline.unet, pipeline.process, pipeline.vae, pipeline.text, pipeline.size)
        (diffusers if config.to == "diffusers" else compvis).write(parts, target)


def compare(one: Pipeline, other: Pipeline) -> float:
    """The largest difference of a pixel in a small picture of the same seed; ValueError when the processes differ."""
    if one.process.config.of_painting() != other.process.config.of_painting():
        raise ValueError(f"read back, the process is {other.process.config}, not {one.process.config}")
    side = 8 * one.unet.config.factor * (one.vae.config.factor if one.vae else 1)
    call: dict[str, Any] = {"steps": 2, "sampler": "ddim", "seed": 0, "width": side, "height": side}
    if one.unet.config.extra_channels:
        call |= {"image": Image.new("RGB", (side, side), "red"), "mask": Image.new("L", (side, side), "white")}
    a, b = (np.asarray(p("a cat astronaut", **call)[0], dtype=np.float64) for p in (one, other))
    return float(abs(a - b).max())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse(Convert, argv, default=None, description=__doc__)
    with errors_for_people():
        convert(config)


if __name__ == "__main__":
    main()
