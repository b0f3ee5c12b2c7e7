"""What the commands txt2img and img2img do: numbered PNGs, each with the record that reproduces it, and a grid."""

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field
from tqdm import tqdm
from tyro.conf import Positional

from ldm.cli import ScriptConfig
from ldm.config import CONFIGS, relative
from ldm.diffusion.guidance import GuidanceConfig
from ldm.diffusion.samplers import SamplerStep, get_sampler
from ldm.imaging import decode_image, image_grid, pad_for_outpainting, save_image
from ldm.io.atomic import check_folder
from ldm.io.model_dir import latest_model, read_text
from ldm.io.tensors import sha256
from ldm.pipeline.inputs import img2img_steps
from ldm.pipeline.load import weights_file
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.record import GenerationRecord, InitImageRecord, read_png, save_png
from ldm.precision import Precision
from ldm.text.prompt_weights import other_syntax

SHIPPED_MODEL = CONFIGS.with_name("models") / "characters"


class Txt2ImgConfig(ScriptConfig):
    """Settings of txt2img."""

    prompts: Positional[tuple[str, ...]] = ()
    """what to generate; several prompts are generated one after the other"""
    prompt_file: str | None = None
    """file with a prompt on each line, where `#` begins a comment and `\\#` a prompt; `-` reads standard input"""
    model: Path | None = None
    """model folder; when left out the newest finished one below runs/, or where there is none models/characters"""
    out: Path = Path("outputs")
    """folder for the images"""
    negative_prompt: str = ""
    steps: int | None = Field(None, ge=1)
    """the sampling steps of the model's own sample images when left out, 30 where it has none"""
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    """1 is no guidance; the scale of the model's own sample images when left out, 7.5 where it has none"""
    guidance: GuidanceConfig = GuidanceConfig()
    sampler: str = "dpmpp_2m"
    """ddpm, ddim, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde, unipc or lcm"""
    eta: float | None = Field(None, ge=0, le=1)
    """fresh noise in each step; the sampler's own when left out"""
    timesteps: str = "trailing"
    """schedule of the steps: trailing, leading, linspace, karras, exponential, log_snr, beta, or a list as 1,0.7,0.3"""
    seed: int = Field(0, ge=0, lt=2**62)
    """of the first image; image i has seed + i"""
    num_images: int = Field(1, ge=1)
    """images of each prompt"""
    batch_size: int = Field(8, ge=1)
    """images generated together"""
    width: int | None = Field(None, ge=1)
    """in pixels; that of the training images when left out"""
    height: int | None = Field(None, ge=1)
    variation_seed: int | None = Field(None, ge=0, lt=2**62)
    """a second seed, towards whose noise the initial noise is interpolated (slerp)"""
    variation_strength: float = Field(0.1, ge=0, le=1)
    """how far: 0 is the noise of `seed`, 1 that of `variation_seed`"""
    guide_model: Path | None = None
    """autoguidance: a smaller or less trained model, whose prediction replaces the unconditional one"""
    vae_tile: int | None = Field(None, ge=8)
    """decode latents larger than this side in tiles: less memory for large images"""
    preview: bool = False
    """keep OUT/preview.png up to date while sampling: the predicted images"""
    device: str | None = None
    """cpu, cuda or mps; the best available one when left out"""
    precision: Precision | None = None
    """what the networks compute in; when left out bf16 on GPUs that have it, else float32"""
    compile: bool = False
    """compile the networks with torch.compile: the first image takes minutes, further ones less than without"""
    reproduce: Path | None = None
    """generate this PNG again, from its metadata"""


class Img2ImgConfig(Txt2ImgConfig):
    """Settings of img2img."""

    image: Path | None = None
    """the image to start from; it is resized and cropped about its centre to width and height, or else to the size of
    the training images where it is twice as large or its sides do not fit"""
    strength: float = Field(0.75, ge=0, le=1)
    """how much of it is generated anew; 1 under a mask forgets what was there"""
    mask: Path | None = None
    """an image of the same size: what is white is generated; what is black stays, and what is clear"""
    inversion_prompt: str | None = None
    """a prompt that describes the image: start from the noise of which DDIM makes it, instead of the seed's"""
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
    """pixels to add beyond the left, top, right and bottom edge of the image of that width and height"""


def generate(config: Txt2ImgConfig) -> None:
    """Generate and save images, each as it comes, then a grid when there are several."""
    get_sampler(config.sampler, config.eta)
    check_folder(config.out, "--out")
    images = [reproduce(config, config.reproduce)] if config.reproduce else generate_all(config)
    files = save_images(images, config.out)
    print(f"saved {len(files)} files: {files[0]}" + (f" ... {files[-1]}" if len(files) > 1 else ""))


def generate_all(config: Txt2ImgConfig) -> Iterator[tuple[Image.Image, GenerationRecord]]:
    """Every image with its record; batch by batch, with a progress bar."""
    prompts = read_prompts(config)
    init_image = init_image_record(config) if isinstance(config, Img2ImgConfig) else None
    path = config.model or default_model()
    pipeline, models = load_models(path, config.guide_model, config.device, config.precision, compiled=config.compile)
    inputs, notes = open_init_image(pipeline, init_image, config.width, config.height)
    batches = batch_records(config, prompts, pipeline, models, inputs, init_image)
    for warning in [*prompt_warnings(pipeline, batches), *size_warnings(pipeline, batches[0])]:
        print(f"warning: {warning}", file=sys.stderr)
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)

    with tqdm(total=sum(map(sampling_steps, batches)), unit="step", desc="sampling") as bar:

        def on_step(index: int, step: SamplerStep) -> None:
            bar.update()
            if config.preview:
                save_image(image_grid(pipeline.preview(step.denoised)), config.out / "preview.png")

        for record in batches:
            yield from generate_batch(pipeline, record, inputs, on_step)


def batch_records(
    config: Txt2ImgConfig,
    prompts: Sequence[str],
    pipeline: Pipeline,
    models: dict[str, str],
    inputs: dict[str, Any],
    init_image: InitImageRecord | None,
) -> list[GenerationRecord]:
    """The record of the first image of each batch, with the fields of `load_models` and what `open_init_image` gave."""
    width, height = inputs["image"].size if inputs else pipeline.image_size(config.width, config.height)
    settings: dict[str, Any] = {  # the other fields of a record have flags of the same names
        **{name: value for name, value in config if name in GenerationRecord.model_fields},
        **models,
        "timesteps": parse_schedule(config.timesteps),
        "width": width,
        "height": height,
        "init_image": init_image,
        "guidance": pipeline.with_own_interval(config.guidance),
        "steps": config.steps or pipeline.default_steps,
    }
    if config.guidance_scale is None:
        settings["guidance_scale"] = pipeline.default_guidance_scale
    records = []
    for prompt, first in itertools.product(prompts, range(0, config.num_images, config.batch_size)):
        batch = {"seed": config.seed + first, "num_images": min(config.batch_size, config.num_images - first)}
        records.append(GenerationRecord(**settings | batch, prompt=prompt, index=0))
    return records


def sampling_steps(record: GenerationRecord) -> int:
    """How many steps a batch takes."""
    init = record.init_image
    return img2img_steps(init.strength if init and init.inversion_prompt is None else 1.0, record.steps)


def generate_batch(
    pipeline: Pipeline,
    record: GenerationRecord,
    inputs: dict[str, Any],
    on_step: Callable[[int, SamplerStep], bool | None] | None = None,
) -> Iterator[tuple[Image.Image, GenerationRecord]]:
    """The images of a batch, each with its record; `on_step` as in the pipeline, where also a record can stop it."""
    stopped = None

    def on_own_step(index: int, step: SamplerStep) -> bool:
        nonlocal stopped
        if (on_step and on_step(index, step)) or index == record.stopped_after:
            stopped = index
        return stopped is not None

    for index, image in enumerate(pipeline(**record.pipeline_kwargs, **inputs, on_step=on_own_step)):
        yield image, record.model_copy(update={"index": index, "stopped_after": stopped})


def reproduce(config: Txt2ImgConfig, path: Path) -> tuple[Image.Image, GenerationRecord]:
    """Generate the whole batch of an image, since numbers differ in the last bit with its size, and pick the image.

    ValueError: other settings are passed too, the file has no record, or a model or an image has changed.
    """
    defaults = type(config)()
    for name, value in config:
        if name not in ("reproduce", "model", "out", "device", "config") and value != getattr(defaults, name):
            raise ValueError(f"--reproduce reads all settings from {path}: leave out {name}")
    record = read_png(path)
    model = config.model or Path(record.model)
    pipeline, models = load_models(model, record.guide_model, config.device, record.precision, compiled=record.compile)
    if record.model_hash != models["model_hash"]:
        raise ValueError(f"the image was generated by another model ({record.model}): pass that one with --model")
    if record.guide_model_hash != models.get("guide_model_hash"):
        raise ValueError(f"{record.guide_model} is not the guide model of this image: put that one back")
    left, top, right, bottom = record.init_image.outpaint if record.init_image else (0, 0, 0, 0)
    size = record.width - left - right, record.height - top - bottom
    inputs, _ = open_init_image(pipeline, record.init_image, *size)
    return list(generate_batch(pipeline, record, inputs))[record.index]


def read_prompts(config: Txt2ImgConfig) -> list[str]:
    """Prompts of the command line, then of the file; ValueError: there is none, or one that is no text."""
    prompts = [*config.prompts, *(read_prompt_file(config.prompt_file) if config.prompt_file else [])]
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty: say what to generate, or leave it out")
    if not prompts:
        raise ValueError('no prompt: say what to generate, as in `python scripts/txt2img.py "a small red circle"`')
    for prompt in (*prompts, config.negative_prompt):
        if re.search("[\ud800-\udfff]", prompt):  # bytes of another encoding
            raise ValueError(f"prompt {prompt!a} is not UTF-8 text: write it in UTF-8")
    return prompts


def read_prompt_file(name: str) -> list[str]:
    r"""The prompts in a file, or in standard input for `-`: its lines, but for blank ones and comments.

    `#` begins a comment, and `\#` a prompt that begins with `#`. ValueError: there is no file, no prompt or no text.
    """
    path, where = Path(name), "standard input" if name == "-" else f"prompt file {name}"
    if name != "-" and (path.is_dir() or not path.exists()):
        raise ValueError(f"{where} does not exist: pass a text file with a prompt on each line")
    try:
        text = sys.stdin.read() if name == "-" else read_text(path)
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8 text: write it in UTF-8") from None
    lines = [line.strip() for line in text.removeprefix("\ufeff").split("\n")]
    prompts = [line.removeprefix("\\") if line.startswith(r"\#") else line for line in lines if line and line[0] != "#"]
    if not prompts:
        raise ValueError(f"{where} is empty: write a prompt on each line")
    if comments := sum(line.startswith("#") for line in lines):
        print(f"{where}: {len(prompts):,} prompts, {comments:,} lines of comment", file=sys.stderr)
    return prompts


def init_image_record(config: Img2ImgConfig) -> InitImageRecord:
    """The image and the mask of the command line; ValueError when a file is missing."""
    for name, path in (("image", config.image), ("mask", config.mask)):
        if path is not None and not path.is_file():
            raise ValueError(f"{name} {path} does not exist")
    if config.image is None:
        raise ValueError("--image is required; txt2img.py generates from a prompt alone")
    values = {name: value for name, value in config if name in InitImageRecord.model_fields}
    mask_hash = sha256(config.mask) if config.mask else None
    return InitImageRecord(**values, image_hash=sha256(config.image), mask_hash=mask_hash)


def default_model() -> Path:
    """The newest finished model below runs/; where there is none, the one that comes with ldm, which is reported."""
    runs, shipped = Path("runs"), relative(SHIPPED_MODEL)
    otherwise = shipped if shipped.is_dir() else None
    path = latest_model("pipeline", runs, script="make demo", otherwise=otherwise)
    if path == otherwise:
        print(f"no finished pipeline below {runs}: {shipped} is used, which comes with ldm", file=sys.stderr)
    return path


def load_models(
    path: Path, guide_path: str | Path | None, device: str | None, precision: Precision | None, *, compiled: bool
) -> tuple[Pipeline, dict[str, str]]:
    """A pipeline, guided by another model if there is one, and the fields of a record that tell what they are."""
    pipeline = Pipeline.load(path, device=device, precision=precision)
    print(f"{path}: {pipeline.components.description}", file=sys.stderr)
    models = {"model": path.as_posix(), "model_hash": sha256(weights_file(path)), "precision": pipeline.precision}
    if guide_path:
        guide = Pipeline.load(guide_path, device=pipeline.device, precision=pipeline.precision)
        pipeline.set_guide_model(guide)
        models |= {"guide_model": str(guide_path), "guide_model_hash": sha256(weights_file(Path(guide_path)))}
    return pipeline.compile() if compiled else pipeline, models


def prompt_warnings(pipeline: Pipeline, batches: Sequence[GenerationRecord]) -> list[str]:
    """What the model cannot have learned, and syntax of other programs, each once."""
    if pipeline.text is None:
        return ["unconditional model: the prompt is ignored"]
    prompts = [record.prompt for record in batches]
    unseen = dict.fromkeys(", ".join(pipeline.unseen_words(prompt)) for prompt in prompts)
    warnings = [f"words never seen in training: {words}" for words in unseen if words]
    init_image = batches[0].init_image
    others = [batches[0].negative_prompt, (init_image and init_image.inversion_prompt) or ""]
    if unknown := list(dict.fromkeys(part for prompt in prompts + others for part in other_syntax(prompt))):
        shown = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        warnings.append(f"prompt syntax that is not known here and is read as words: {shown}")
    return warnings


def size_warnings(pipeline: Pipeline, record: GenerationRecord) -> list[str]:
    """A size that the model has not learned."""
    width, height, own = record.width, record.height, pipeline.resolution
    if pipeline.is_near_training_size(width, height):
        return []
    return [f"{width}x{height} is far from the size of the training images: set width and height to {own}"]


def parse_schedule(text: str) -> str | tuple[float, ...]:
    """The name of a schedule, or a list of t."""
    if "," not in text:
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"timesteps {text!r} is not a list of numbers: write them as 1,0.7,0.3") from None


def open_init_image(
    pipeline: Pipeline, record: InitImageRecord | None, width: int | None, height: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The arguments of the pipeline, of this size before outpainting, and what was changed for that.

    ValueError: a file has changed since, or cannot be read.
    """
    if record is None:
        return {}, []
    opened, notes = _open_unchanged(record.image, record.image_hash, "white")
    mask = None
    if record.mask:
        mask, more = _open_unchanged(record.mask, record.mask_hash, "black")
        notes += more
    image, mask = pipeline.fit_init_image(opened, mask, width, height)
    if image.size != opened.size:
        before, after = (f"{width}x{height}" for width, height in (opened.size, image.size))
        cropped = " and cropped" * (opened.width * image.height != opened.height * image.width)
        notes.append(f"{record.image.name}: {before} resized{cropped} to {after}; width and height set it")
    if any(record.outpaint):
        image, mask = pad_for_outpainting(image, mask, record.outpaint)
    inputs = {"image": image, "mask": mask, "strength": record.strength, "inversion_prompt": record.inversion_prompt}
    return inputs, notes


def _open_unchanged(path: Path, digest: str | None, background: str) -> tuple[Image.Image, list[str]]:
    """An image, whose clear pixels get the colour of the background, and a note where it has some."""
    if not path.is_file() or sha256(path) != digest:
        raise ValueError(f"{path} is not the image that this was generated from: put that one back")
    try:
        white, black = (decode_image(path, background=color) for color in ("white", "black"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    image = white if background == "white" else black
    image.info.clear()  # such as the orientation: it is upright now
    return image, [f"{path.name} is transparent in part: clear counts as {background}"] if white != black else []


def save_images(images: Iterable[tuple[Image.Image, GenerationRecord]], out: Path) -> list[Path]:
    """Write each image as it comes, numbered after the PNGs that are there, then a grid when there are several."""
    first = 1 + max((int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()), default=-1)
    files, grid = [], []
    for number, (image, record) in enumerate(images, start=first):
        files.append(out / f"{number:05d}.png")
        grid.append(image)
        save_png(files[-1], image, record)
    if len(grid) > 1:
        files.append(out / f"grid-{first:05d}.png")
        save_image(image_grid(grid), files[-1])
    return files
