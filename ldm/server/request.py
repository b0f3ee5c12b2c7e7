"""What may be asked of the server: the settings of txt2img and img2img within limits, and images by their id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from ldm.config import Config
from ldm.diffusion.guidance import GuidanceConfig
from ldm.diffusion.samplers import get_sampler
from ldm.diffusion.timesteps import SCHEDULES
from ldm.pipeline.generate import Img2ImgConfig, Txt2ImgConfig, parse_schedule
from ldm.pipeline.record import GenerationRecord

MAX_STEPS: Final = 200
MAX_SIDE: Final = 2048  # pixels
MAX_IMAGES: Final = 64  # of a job
MAX_TEXT: Final = 4000  # characters
MAX_VALUES: Final = 8  # on an axis of a grid
MAX_SEED: Final = 2**53  # up to where numbers of JavaScript are exact
RANDOM_SEEDS: Final = 2**32  # those that are drawn are below


class Axis(Config):
    """A setting that varies along one side of a grid."""

    setting: Literal[
        "prompt",
        "negative_prompt",
        "steps",
        "guidance_scale",
        "sampler",
        "eta",
        "timesteps",
        "seed",
        "variation_seed",
        "variation_strength",
        "strength",
    ]
    values: tuple[int | float | str, ...] = Field(min_length=1, max_length=MAX_VALUES)


class GenerationRequest(Config):
    """What to generate; what is left out is the model's own, as in txt2img."""

    model: str | None = Field(None, max_length=MAX_TEXT)
    """one of the models of `/api/session`; the first when left out"""
    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    negative_prompt: str = Field("", max_length=MAX_TEXT)
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=-100, le=100)
    guidance: GuidanceConfig = GuidanceConfig()
    sampler: str = Field("dpmpp_2m", max_length=100)
    eta: float | None = Field(None, ge=0, le=1)
    timesteps: str = Field("trailing", max_length=MAX_TEXT)
    """name of a schedule, or a list as 1,0.7,0.3"""
    seed: int | None = Field(None, ge=0, lt=MAX_SEED)
    """of the first image; image i has seed + i; random when left out"""
    num_images: int = Field(1, ge=1, le=MAX_IMAGES)
    batch_size: int = Field(4, ge=1, le=8)
    """images generated together"""
    width: int | None = Field(None, ge=1, le=MAX_SIDE)
    height: int | None = Field(None, ge=1, le=MAX_SIDE)
    variation_seed: int | None = Field(None, ge=0, lt=MAX_SEED)
    variation_strength: float = Field(0.1, ge=0, le=1)
    vae_tile: int | None = Field(None, ge=8, le=MAX_SIDE)
    image: str | None = Field(None, max_length=100)
    """id of an upload or of an image of the history to start from"""
    mask: str | None = Field(None, max_length=100)
    """id of an upload of the same size: what is white is generated"""
    strength: float = Field(0.75, ge=0, le=1)
    inversion_prompt: str | None = Field(None, max_length=MAX_TEXT)
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
    """pixels to add beyond the left, top, right and bottom edge of the image"""
    x: Axis | None = None
    """what varies to the right in a grid"""
    y: Axis | None = None
    """what varies downwards"""

    @model_validator(mode="after")
    def _check(self) -> "GenerationRequest":
        if not self.prompt.strip():
            raise ValueError("prompt is empty: say what to generate")
        get_sampler(self.sampler, self.eta)
        schedule = parse_schedule(self.timesteps)
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(f"timesteps {schedule!r} are unknown: choose one of {', '.join(SCHEDULES)}, or list them")
        if max(self.seed or 0, self.variation_seed or 0) + self.num_images > MAX_SEED:
            raise ValueError(f"seed and variation_seed with num_images go beyond {MAX_SEED}: choose lower ones")
        if any(not 0 <= edge <= MAX_SIDE for edge in self.outpaint):
            raise ValueError(f"outpaint {self.outpaint}: each edge is from 0 to {MAX_SIDE} pixels")
        if self.image is None and (self.mask or self.inversion_prompt is not None or any(self.outpaint)):
            raise ValueError("mask, inversion_prompt and outpaint need an image to start from")
        settings = {axis.setting for axis in (self.x, self.y) if axis}
        if len(settings) == 1 and self.x and self.y:
            raise ValueError(f"both axes vary {self.x.setting}: choose another setting for one")
        if "strength" in settings and self.image is None:
            raise ValueError("an axis of strength needs an image to start from")
        if "variation_strength" in settings and self.variation_seed is None and "variation_seed" not in settings:
            raise ValueError("an axis of variation_strength needs a variation_seed")
        if self.is_grid and self.num_images > 1:
            raise ValueError(f"num_images is {self.num_images}: a grid has one image for each combination")
        return self

    @property
    def is_grid(self) -> bool:
        """Whether a setting varies over a grid."""
        return self.x is not None or self.y is not None

    def cells(self) -> list[list["GenerationRequest"]]:
        """The requests of a grid, row by row, this one alone without axes; ValueError: a value does not fit."""
        columns, rows = (axis.values if axis else (None,) for axis in (self.x, self.y))
        return [[self._cell(x, y) for x in columns] for y in rows]

    def _cell(self, x: int | float | str | None, y: int | float | str | None) -> "GenerationRequest":
        values = self.to_dict() | {"x": None, "y": None}
        for axis, value in ((self.x, x), (self.y, y)):
            if axis is not None:
                values[axis.setting] = value
        return GenerationRequest.from_dict(values, source="grid")

    def script_config(self, model: Path, input_file: Callable[[str], Path | None]) -> Txt2ImgConfig:
        """The settings as those of the script that generates the same;

        ValueError: an image that `input_file` does not find.
        """
        values = {name: value for name, value in self if name in Txt2ImgConfig.model_fields and name != "model"}
        values |= {"model": model, "prompts": (self.prompt,)}
        if self.image is None:
            return Txt2ImgConfig(**values)
        own = {name: getattr(self, name) for name in ("strength", "inversion_prompt", "outpaint")}
        images = {name: input_file(value) for name in ("image", "mask") if (value := getattr(self, name))}
        if None in images.values():
            raise ValueError("an image to start from is gone: upload it again")
        return Img2ImgConfig(**values, **own, **images)


def request_of(record: GenerationRecord) -> dict[str, Any]:
    """The request for the one image of a record. Its image and mask are named by their hashes, as uploads are."""
    values: dict[str, Any] = {name: value for name, value in record if name in GenerationRequest.model_fields}
    values |= {"seed": record.seed + record.index, "num_images": 1}
    if record.variation_seed is not None:
        values["variation_seed"] = record.variation_seed + record.index
    if not isinstance(record.timesteps, str):
        values["timesteps"] = ",".join(map(str, record.timesteps))
    if init := record.init_image:
        left, top, right, bottom = init.outpaint
        values |= {"width": record.width - left - right, "height": record.height - top - bottom}
        values |= {"image": init.image_hash, "mask": init.mask_hash, "strength": init.strength}
        values |= {"inversion_prompt": init.inversion_prompt, "outpaint": init.outpaint}
    return GenerationRequest.from_dict(values, source="record").to_dict()
