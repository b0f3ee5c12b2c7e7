"""What a painted PNG says of itself: the conventional `parameters` text and a JSON chunk that can be painted again."""

import json
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field, ValidationError, model_validator

from ldm.config import Config
from ldm.data.sources.decode import decode_image
from ldm.diffusion.guidance import GuidanceConfig
from ldm.imaging import pad_for_outpainting, save_image
from ldm.io.tensors import sha256

PNG_CHUNK = "ldm"
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
    """The picture that another one was painted from."""

    image: str
    image_hash: str
    strength: float
    mask: str | None = None
    mask_hash: str | None = None
    inversion_prompt: str | None = None
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def pipeline_kwargs(self) -> dict[str, Any]:
        """The arguments of the pipeline; ValueError when a file is another than it was."""
        image = self._open(self.image, self.image_hash)
        mask = self._open(self.mask, self.mask_hash).convert("L") if self.mask else None
        if any(self.outpaint):
            image, mask = pad_for_outpainting(image, mask, self.outpaint)
        return {"image": image, "mask": mask, "strength": self.strength, "inversion_prompt": self.inversion_prompt}

    @staticmethod
    def _open(path: str, digest: str | None) -> Image.Image:
        if not Path(path).is_file() or sha256(Path(path)) != digest:
            raise ValueError(f"{path} is not the picture that this was painted from: put that one back")
        try:
            return decode_image(Path(path).read_bytes(), channels=3)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


class GenerationRecord(Config):
    """The call of the pipeline that painted a picture, which picture of its batch it is, and the model."""

    version: Literal[2] = 2
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

    @model_validator(mode="after")
    def _check_index(self) -> "GenerationRecord":
        if self.index >= self.num_images:
            raise ValueError(f"index {self.index} is none of {self.num_images} pictures")
        return self

    @property
    def pipeline_kwargs(self) -> dict[str, Any]:
        """The arguments of the pipeline."""
        beside = {"version", "index", "init_image", "model", "model_hash", "guide_model", "guide_model_hash"}
        call = {name: getattr(self, name) for name in GenerationRecord.model_fields if name not in beside}
        return call | self.init_image.pipeline_kwargs if self.init_image else call


def save_png(path: Path, image: Image.Image, record: GenerationRecord) -> None:
    """Write a picture with its record."""
    info = PngInfo()
    info.add_itxt("parameters", a1111_parameters(record))
    info.add_itxt(PNG_CHUNK, json.dumps(record.to_dict(), ensure_ascii=False, sort_keys=True))
    save_image(image, path, pnginfo=info)


def read_png(path: Path) -> GenerationRecord:
    """The record of a picture that `save_png` wrote; ValueError when there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such picture")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.text.get(PNG_CHUNK)  # type: ignore[attr-defined]
    except Exception:  # damaged files raise errors of many types in Pillow's decoder
        raise ValueError(f"{path} is no PNG file that can be read") from None
    if text is None:
        raise ValueError(f"{path} was not painted by txt2img, or lost its metadata: it can not be reproduced")
    try:
        return GenerationRecord.model_validate_json(text)
    except ValidationError:
        raise ValueError(f"{path} was painted by another version of ldm: it can not be reproduced") from None


def a1111_parameters(record: GenerationRecord) -> str:
    """The text that other image tools read: prompt, negative prompt, then settings."""
    settings = {
        "Steps": record.steps,
        "Sampler": SAMPLER_NAMES[record.sampler],
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
