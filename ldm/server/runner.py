"""Does the jobs: loads the model that one asks for, samples, and adds its images to the history."""

import base64
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from ldm.config import relative
from ldm.diffusion.samplers import SamplerStep
from ldm.imaging import image_grid
from ldm.io.model_dir import model_kind
from ldm.labels import LabelFont
from ldm.pipeline.generate import (
    SHIPPED_MODEL,
    Img2ImgConfig,
    Txt2ImgConfig,
    batch_records,
    generate_batch,
    init_image_record,
    load_models,
    open_init_image,
    prompt_warnings,
    sampling_steps,
    size_warnings,
)
from ldm.pipeline.load import weights_file
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.record import InitImageRecord
from ldm.precision import Precision
from ldm.server.history import History
from ldm.server.jobs import Job
from ldm.server.request import MAX_SIDE, GenerationRequest, request_of

PREVIEW_SIDE, FILM_SIDE = 512, 128  # pixels, at most
PREVIEW_SECONDS = 0.1  # between previews of steps that are faster
FILM_NUMBERS = 2**26  # of states and predictions that wait to become a film; larger batches have none
SHEET_SIDE = 4096  # pixels, of a grid without its labels, at most
LABEL_HEIGHT, LABEL_WIDTH = 18, 110  # pixels, of a grid


class Skip(Exception):
    """Leaves out what a job generates at this moment."""


def find_models() -> dict[str, Path]:
    """The models below runs/ and models/ by their names, and the one that comes with ldm: newest first in each."""
    found = [path for root in (Path("runs"), Path("models")) for path in sorted(_models_below(root), key=_age)]
    shipped = relative(SHIPPED_MODEL)
    if shipped.is_dir() and not any(path.samefile(shipped) for path in found):
        found.append(shipped)
    return {path.as_posix(): path for path in found}


def _models_below(root: Path) -> Iterator[Path]:
    """Model folders, ours and those of diffusers, also behind links; below models/ also single files."""
    seen: set[str] = set()
    for name, subfolders, files in os.walk(root, followlinks=True):
        folder, real = Path(name), os.path.realpath(name)
        if real in seen:
            subfolders.clear()
        elif "model.json" in files or "model_index.json" in files:
            subfolders.clear()
            if "model_index.json" in files or _may_generate(folder):
                yield folder
        elif root.name == "models":
            single = (folder / file for file in files if file.endswith(".safetensors"))
            yield from (file for file in single if file.is_file())  # no dangling link
        seen.add(real)


def _may_generate(folder: Path) -> bool:
    """Whether this is a whole model, or one whose model.json is damaged, which loading it will say."""
    try:
        return model_kind(folder) == "pipeline"
    except ValueError:
        return True


def _age(path: Path) -> tuple[bool, float]:
    """Single files after folders, which are sure to be models; then the newest first."""
    file = next((path / name for name in ("model.json", "model_index.json") if (path / name).is_file()), path)
    try:
        return path.is_file(), -file.stat().st_mtime
    except OSError:  # it is being removed
        return True, 0.0


class ModelRunner:
    """Does the jobs. It has the model of the last job in memory."""

    def __init__(
        self,
        models: Callable[[], dict[str, Path]],
        history: History,
        *,
        device: str | None,
        precision: Precision | None,
    ) -> None:
        self.models, self.history, self.device, self.precision = models, history, device, precision
        self._loaded: tuple[tuple[Path, int], Pipeline, dict[str, str]] | None = None

    def find(self, name: str | None) -> Path:
        """A model by its name, the first where there is none; ValueError: none is listed under that name."""
        models = self.models()
        if not models or (name is not None and name not in models):
            raise ValueError(f"model {name or ''} is not below models/ or runs/: choose one of the list")
        return models[name] if name is not None else next(iter(models.values()))

    def load(self, path: Path) -> tuple[Pipeline, dict[str, str]]:
        """The pipeline, and the fields of a record that say what it is; loaded where it is not the last one."""
        weights = weights_file(path)
        version = path, weights.stat().st_mtime_ns if weights.is_file() else 0
        if self._loaded is None or self._loaded[0] != version:
            self._loaded = None  # no two are in memory
            pipeline, models = load_models(path, None, self.device, self.precision, compiled=False)
            side = pipeline.resolution
            pipeline.preview(torch.zeros(1, *pipeline.latent_shape(side, side), device=pipeline.device))  # fitted once
            self._loaded = version, pipeline, models
        return self._loaded[1:]

    def load_first(self) -> None:
        """Load the first model, so that the first job need not wait for it; an error is that job's."""
        with suppress(ValueError, OSError):
            self.load(self.find(None))

    def run(self, job: Job, changed: Callable[[], None]) -> None:
        """Generate what a job asks for. ValueError: an unknown model or image, or what txt2img refuses."""
        path = self.find(job.request.model)
        pipeline, fields = self.load(path)
        work: list[Batches] = []
        for cell in itertools.chain.from_iterable(job.request.cells()):
            work.append(Batches(cell, pipeline, fields, path, self.history, like=work[0] if work else None))
        job.warnings = list(dict.fromkeys(warning for batches in work for warning in batches.warnings))
        job.steps = sum(sampling_steps(record) for batches in work for record in batches.records)
        job.state, started = "sampling", time.monotonic()
        changed()
        cells: list[Image.Image] = []
        for image in itertools.chain.from_iterable(self._generate(job, one, started, changed) for one in work):
            if job.request.is_grid:
                cells.append(image)
        if cells and len(cells) == len(work):
            job.images.append(self.history.add_grid(labelled_grid(cells, job.request), job.request.to_dict()).id)

    def _generate(
        self, job: Job, batches: "Batches", started: float, changed: Callable[[], None]
    ) -> Iterator[Image.Image]:
        """The images of some batches, which are in the history; those of a stopped one as they are by then."""
        for record in batches.records:
            if job.stops:
                job.cut_short = True
                return
            job.skips = False  # that was meant for what is over
            taken, before = list[SamplerStep](), job.step
            on_step = self._follow(job, batches.pipeline, taken, sampling_steps(record), started, changed)
            try:
                made = list(generate_batch(batches.pipeline, record, batches.inputs, on_step))
            except Skip:
                job.step = before + sampling_steps(record)
                job.skipped += sampling_steps(record)
                changed()
                continue
            job.cut_short |= made[0][1].stopped_after is not None
            entries = [self.history.add(image, own, request_of(own)) for image, own in made]
            job.images += [entry.id for entry in entries]
            changed()
            for index, entry in enumerate(entries):
                if frames := film_frames(batches.pipeline, taken, index):
                    self.history.add_film(entry, frames)
                changed()
            yield from (image for image, _ in made)

    def _follow(
        self,
        job: Job,
        pipeline: Pipeline,
        taken: list[SamplerStep],
        steps: int,
        started: float,
        changed: Callable[[], None],
    ) -> Callable[[int, SamplerStep], bool]:
        """What to do after each step of a batch: show it, remember it for the film, and ask whether it goes on."""
        shown = 0.0  # when the last preview was made

        def on_step(index: int, step: SamplerStep) -> bool:
            nonlocal shown
            if job.skips and not job.stops:
                raise Skip
            stops = job.stops
            if stops or time.monotonic() - shown > PREVIEW_SECONDS:
                job.preview, shown = data_url(image_grid(pipeline.preview(step.denoised), gap=0)), time.monotonic()
            job.step, job.seconds = job.step + 1, time.monotonic() - started
            if 2 * step.z.numel() * steps <= FILM_NUMBERS:
                taken.append(step)
            changed()
            return stops

        return on_step


class Batches:
    """What a request without axes comes to. Other cells of a grid start from the same image, opened once."""

    def __init__(
        self,
        request: GenerationRequest,
        pipeline: Pipeline,
        models: dict[str, str],
        path: Path,
        history: History,
        like: "Batches | None",
    ) -> None:
        config = request.script_config(path, history.input_file)
        init_image, notes = None, list[str]()
        if isinstance(config, Img2ImgConfig):
            init_image = init_image_record(config)
            check_size(pipeline, init_image, config)
        self.inputs: dict[str, Any]
        if init_image and like:
            own = {"strength": init_image.strength, "inversion_prompt": init_image.inversion_prompt}
            self.inputs = like.inputs | own
        else:
            self.inputs, notes = open_init_image(pipeline, init_image, config.width, config.height)
        self.pipeline = pipeline
        self.records = batch_records(config, config.prompts, pipeline, models, self.inputs, init_image)
        for record in self.records:
            request_of(record)  # which must be a valid request, before it is sampled
        self.warnings = [*prompt_warnings(pipeline, self.records), *size_warnings(pipeline, self.records[0]), *notes]


def check_size(pipeline: Pipeline, init_image: InitImageRecord, config: Txt2ImgConfig) -> None:
    """ValueError where an image to start from, resized and outpainted, is larger than what may be asked for."""
    left, top, right, bottom = init_image.outpaint
    with Image.open(init_image.image) as image:
        width, height = pipeline.image_size(config.width, config.height, image)
    if max(width + left + right, height + top + bottom) > MAX_SIDE:
        size = f"{width + left + right}x{height + top + bottom}"
        raise ValueError(f"the image would be {size}, beyond {MAX_SIDE} pixels: choose a smaller width and height")


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
    most = SHEET_SIDE // max(len(columns), len(rows), 1)
    images = [ImageOps.contain(image, (most, most)) if max(image.size) > most else image for image in images]
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
