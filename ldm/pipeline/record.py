"""The record in a generated PNG: the conventional `parameters` text, and a JSON chunk that `--reproduce` reads."""

import json
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field, ValidationError, model_validator

from ldm.config import Config
from ldm.diffusion.guidance import GuidanceConfig
from ldm.imaging import save_image
from ldm.precision import Precision

PNG_CHUNK = "ldm"
RECORD_VERSION: Final = 2
SAMPLER_NAMES = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}


class InitImageRecord(Config):
    """The image, and the mask, that another image was generated from; hashes are SHA-256 of the files."""

    image: Path
    image_hash: str
    strength: float
    mask: Path | None = None
    mask_hash: str | None = None
    inversion_prompt: str | None = None
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)


class GenerationRecord(Config):
    """The call of the pipeline that generated an image, the image's index in that batch, and the models."""

    version: Literal[2] = RECORD_VERSION
    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float
    guidance: GuidanceConfig = GuidanceConfig()
    sampler: str
    eta: float | None
    timesteps: str | tuple[float, ...] = "trailing"
    width: int
    height: int
    seed: int
    num_images: int
    index: int = Field(ge=0)
    variation_seed: int | None = None
    variation_strength: float = 0.0
    vae_tile: int | None = None
    init_image: InitImageRecord | None = None
    model: str
    model_hash: str
    guide_model: str | None = None
    guide_model_hash: str | None = None
    precision: Precision = "float32"
    compile: bool = False
    stopped_after: int | None = None
    """the step whose prediction the image is, where sampling was stopped"""

    @model_validator(mode="after")
    def _check_index(self) -> "GenerationRecord":
        if self.index >= self.num_images:
            raise ValueError(f"index {self.index} is outside a batch of {self.num_images} images")
        return self

    @property
    def pipeline_kwargs(self) -> dict[str, Any]:
        """The arguments of `Pipeline.__call__`, without those of the init image."""
        others = {
            "version",
            "index",
            "init_image",
            "model",
            "model_hash",
            "guide_model",
            "guide_model_hash",
            "precision",
            "compile",
            "stopped_after",
        }
        return {name: value for name, value in self if name not in others}


def save_png(path: Path, image: Image.Image, record: GenerationRecord) -> None:
    """Write an image with its record."""
    info = PngInfo()
    info.add_itxt("parameters", a1111_parameters(record))
    info.add_itxt(PNG_CHUNK, json.dumps(record.to_dict(), ensure_ascii=False, sort_keys=True))
    save_image(image, path, pnginfo=info)


def read_png(path: Path) -> GenerationRecord:
    """The record of an image that `save_png` wrote; ValueError when it has none that can be read."""
    if not path.is_file():
        raise ValueError(f"{path}: no such image")
    text = png_texts(path).get(PNG_CHUNK)
    if text is None:
        raise ValueError(f"{path}: no generation metadata in this PNG; only images of txt2img and img2img have it")
    return parse_record(text, path)


def png_texts(file: Path | BinaryIO) -> dict[str, str]:
    """The texts in a PNG by their keywords; ValueError: it is no PNG that can be read."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return dict(image.text)  # type: ignore[attr-defined]
    except Exception:  # damaged files raise errors of many types in Pillow's decoder
        raise ValueError(f"{file} is not a readable PNG file") from None


def parse_record(text: str, where: object) -> GenerationRecord:
    """A record as a PNG holds it; ValueError names where it is from, and what is wrong."""
    try:
        return GenerationRecord.model_validate_json(text)
    except ValidationError as error:
        reason = "its record is damaged"
        for fault in error.errors():
            if fault["loc"] == ("version",) and isinstance(version := fault["input"], int):
                age = "an older" if version < RECORD_VERSION else "a newer"
                reason = f"it was made by {age} version of ldm (record {version}, this one reads {RECORD_VERSION})"
        raise ValueError(f"{where} cannot be reproduced: {reason}") from None


def a1111_parameters(record: GenerationRecord) -> str:
    """The text that other image tools read: prompt, negative prompt, then settings."""
    settings = {
        "Steps": record.steps,
        "Sampler": SAMPLER_NAMES.get(record.sampler, record.sampler),
        "CFG scale": record.guidance_scale,
        "Seed": record.seed + record.index,
        "Size": f"{record.width}x{record.height}",
        "Model hash": record.model_hash[:10],
        "Model": record.model,
    }
    lines = [record.prompt]
    if record.negative_prompt:
        lines.append(f"Negative prompt: {record.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items())])


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value
