"""Does the jobs: loads the model that one asks for, samples, and adds its images to the history."""

import base64
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from ldm.config import relative
from ldm.diffusion.samplers import SamplerStep
from ldm.imaging import image_grid
from ldm.io.model_dir import model_kind
from ldm.labels import LabelFont
from ldm.pipeline.generate import (
    SHIPPED_MODEL,
    Img2ImgConfig,
    batch_records,
    generate_batch,
    init_image_record,
    load_models,
    open_init_image,
    prompt_warnings,
    sampling_steps,
    size_warnings,
)
from ldm.pipeline.pipeline import Pipeline
from ldm.precision import Precision
from ldm.server.history import History
from ldm.server.jobs import Job, Skip
from ldm.server.request import GenerationRequest, request_of

PREVIEW_SIDE, FILM_SIDE = 512, 128  # pixels, at most
PREVIEW_SECONDS = 0.04  # between previews of steps that are faster
LABEL_HEIGHT, LABEL_WIDTH = 18, 110  # pixels, of a grid


def find_models() -> dict[str, Path]:
    """The models below models/ and runs/ by their names, and the one that comes with ldm: newest first."""
    found = [path for root in (Path("runs"), Path("models")) for path in _models_below(root)]
    found.sort(key=lambda path: -path.stat().st_mtime)
    shipped = relative(SHIPPED_MODEL)
    if shipped.is_dir() and not any(path.samefile(shipped) for path in found):
        found.append(shipped)
    return {path.as_posix(): path for path in found}


def _models_below(root: Path) -> Iterator[Path]:
    """Model folders, ours and those of diffusers; below models/ also single files."""
    for name, subfolders, files in os.walk(root):
        folder = Path(name)
        if "model.json" in files or "model_index.json" in files:
            subfolders.clear()
            if "model_index.json" in files or model_kind(folder) == "pipeline":
                yield folder
        elif root.name == "models":
            yield from (folder / file for file in files if file.endswith(".safetensors"))


class Generator:
    """Keeps the model of the last job in memory."""

    def __init__(
        self,
        models: Callable[[], dict[str, Path]],
        history: History,
        *,
        device: str | None,
        precision: Precision | None,
    ) -> None:
        self.models, self.history, self.device, self.precision = models, history, device, precision
        self._loaded: tuple[Path, Pipeline, dict[str, str]] | None = None

    def load(self, path: Path) -> tuple[Pipeline, dict[str, str]]:
        """The pipeline, and the fields of a record that say what it is; loaded where it is not the last one."""
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None  # no two are in memory
            pipeline, models = load_models(path, None, self.device, self.precision, compiled=False)
            side = pipeline.resolution
            pipeline.preview(torch.zeros(1, *pipeline.latent_shape(side, side), device=pipeline.device))  # fitted once
            self._loaded = path, pipeline, models
        return self._loaded[1:]

    def load_first(self) -> None:
        """Load the first model, so that the first job need not wait for it; an error is that job's."""
        with suppress(ValueError, OSError, StopIteration):
            self.load(next(iter(self.models().values())))

    def run(self, job: Job, changed: Callable[[], None]) -> None:
        """Generate everything that a job asks for. ValueError: an unknown model or image, or what txt2img refuses."""
        models = self.models()
        name = job.request.model or next(iter(models))
        if name not in models:
            raise ValueError(f"model {name} is not below models/ or runs/: choose one of the list")
        pipeline, fields = self.load(models[name])
        cells = job.request.cells()
        work = [Batches(cell, pipeline, fields, models[name], self.history) for row in cells for cell in row]
        job.warnings = list(dict.fromkeys(warning for batches in work for warning in batches.warnings))
        job.steps = sum(sampling_steps(record) for batches in work for record in batches.records)
        job.state, started = "sampling", time.monotonic()
        images = [image for batches in work for image in self._generate(job, batches, started, changed)]
        if job.request.is_grid and len(images) == len(work) and job.wish != "stop":
            grid = labelled_grid(images, job.request)
            job.images.append(self.history.add_grid(grid, job.request.to_dict()).id)

    def _generate(
        self, job: Job, batches: "Batches", started: float, changed: Callable[[], None]
    ) -> Iterator[Image.Image]:
        """The images of some batches, which are in the history; those of a stopped one as they are by then."""
        for record in batches.records:
            if job.wish == "stop":
                return
            taken, before = list[SamplerStep](), job.step
            on_step = self._follow(job, batches.pipeline, taken, started, changed)
            try:
                for image, own in generate_batch(batches.pipeline, record, batches.inputs, on_step):
                    film = film_frames(batches.pipeline, taken, own.index)
                    entry = self.history.add(image, own, request_of(own), film)
                    job.images.append(entry.id)
                    yield image
                changed()
            except Skip:
                job.wish = None
                job.step = before + sampling_steps(record)
                changed()

    def _follow(
        self, job: Job, pipeline: Pipeline, taken: list[SamplerStep], started: float, changed: Callable[[], None]
    ) -> Callable[[int, SamplerStep], bool]:
        """What to do after each step of a batch: show it, and ask whether it goes on."""
        shown = 0.0  # when the last preview was made

        def on_step(index: int, step: SamplerStep) -> bool:
            nonlocal shown
            if job.wish == "skip":
                raise Skip
            stops = job.wish == "stop"
            if stops or time.monotonic() - shown > PREVIEW_SECONDS:
                job.preview, shown = data_url(image_grid(pipeline.preview(step.denoised), gap=0)), time.monotonic()
            job.step, job.seconds = job.step + 1, time.monotonic() - started
            taken.append(step)
            changed()
            return stops

        return on_step


class Batches:
    """What a request without axes comes to."""

    def __init__(
        self, request: GenerationRequest, pipeline: Pipeline, models: dict[str, str], path: Path, history: History
    ) -> None:
        config = request.script_config(path, history.input_file)
        init_image = init_image_record(config) if isinstance(config, Img2ImgConfig) else None
        self.pipeline, self.inputs = pipeline, open_init_image(pipeline, init_image, config.width, config.height)
        self.records = batch_records(config, config.prompts, pipeline, models, self.inputs, init_image)
        self.warnings = [*prompt_warnings(pipeline, self.records), *size_warnings(pipeline, self.records[0])]


def film_frames(pipeline: Pipeline, steps: Sequence[SamplerStep], index: int) -> list[Image.Image]:
    """A frame of one image for each step: a preview of the state, and below it one of the prediction."""
    frames = []
    for step in steps:
        previews = pipeline.preview(torch.cat([step.z[index : index + 1], step.denoised[index : index + 1]]))
        for preview in previews:
            preview.thumbnail((FILM_SIDE, FILM_SIDE))
        frames.append(image_grid(previews, columns=1, gap=0))
    return frames


def data_url(image: Image.Image) -> str:
    """A preview within an event: PNG where it is small, else JPEG, which takes a few milliseconds."""
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    kind = "png" if max(image.size) <= 32 else "jpeg"
    buffer = BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def labelled_grid(images: list[Image.Image], request: GenerationRequest) -> Image.Image:
    """Images in the order of `GenerationRequest.cells`, with both settings and their values beside them."""
    columns, rows = ([str(value) for value in axis.values] if axis else [] for axis in (request.x, request.y))
    settings = [axis.setting.replace("_", " ") if axis else "" for axis in (request.x, request.y)]
    grid, font = image_grid(images, columns=len(columns) or 1), LabelFont([*columns, *rows, *settings])
    left, top = LABEL_WIDTH if rows else 0, 3 * LABEL_HEIGHT if columns else LABEL_HEIGHT
    sheet = Image.new("RGB", (grid.width + left, grid.height + top), "white")
    sheet.paste(grid, (left, top))
    width, height = (max(sides) + 2 for sides in zip(*(image.size for image in images), strict=True))
    texts = [(settings[0], left, 0, grid.width, 1), (settings[1], 0, top - LABEL_HEIGHT, left or 1, 1)]
    texts += [(text, left + i * width, LABEL_HEIGHT, width, 2) for i, text in enumerate(columns)]
    texts += [(text, 0, top + i * height, left, 4) for i, text in enumerate(rows)]
    for text, x, y, space, lines in texts:
        if text:
            sheet.paste(font.label(text, space - 4, lines=lines), (x + 2, y + 2))
    return sheet
