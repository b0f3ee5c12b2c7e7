"""What a painted PNG says of itself: the conventional `parameters` text and a JSON chunk that can be painted again."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

CHUNK, VERSION = "ldm", 1
SAMPLER_NAMES = {"ddpm": "DDPM", "ddim": "DDIM", "euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}


def save_png(path: Path, image: Image.Image, record: dict[str, Any]) -> None:
    """Write a picture with its record: prompt, negative_prompt, steps, sampler, guidance_scale, seed, index, ..."""
    info = PngInfo()
    info.add_itxt("parameters", parameters(record, image.size))
    info.add_itxt(CHUNK, json.dumps({"version": VERSION, **record}, ensure_ascii=False, sort_keys=True))
    image.save(path, pnginfo=info)


def read_png(path: Path) -> dict[str, Any]:
    """The record of a picture that `save_png` wrote; ValueError when there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such picture")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.text.get(CHUNK)  # type: ignore[attr-defined]
    except OSError:
        raise ValueError(f"{path} is no PNG file that can be read") from None
    if text is None:
        raise ValueError(f"{path} was not painted by txt2img, or lost its metadata: it can not be reproduced")
    record = json.loads(text)
    if record.pop("version") != VERSION:
        raise ValueError(f"{path} was painted by another version of ldm: it can not be reproduced")
    return record


def parameters(record: dict[str, Any], size: tuple[int, int]) -> str:
    """The text that other image tools read: prompt, negative prompt, then settings."""
    settings = {
        "Steps": record["steps"],
        "Sampler": SAMPLER_NAMES[record["sampler"]],
        "CFG scale": record["guidance_scale"],
        "Seed": record["seed"] + record["index"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": record["model_hash"][:10],
        "Model": record["model"],
    }
    lines = [record["prompt"]]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items())])


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value
