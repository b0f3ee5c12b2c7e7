"""Paint pictures from prompts: numbered PNGs, each with what is needed to paint it again, and a grid."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from tqdm import tqdm
from tyro.conf import Positional

from ldm import folders, pictures
from ldm.config import ScriptConfig, errors_for_people, parse
from ldm.diffusion.guidance import GuidanceConfig
from ldm.diffusion.samplers import Step, find_sampler
from ldm.metadata import Record, SourceRecord, read_png, save_png
from ldm.pipeline import Pipeline, steps_of
from ldm.weights import sha256

Painted = tuple[Image.Image, Record]
BESIDE_REPRODUCE = {"reproduce", "model", "out", "device", "config"}


class Txt2Img(ScriptConfig):
    """Settings of txt2img."""

    prompts: Positional[tuple[str, ...]] = ()
    """what to paint; several prompts are painted one after the other"""
    prompt_file: str | None = None
    """file with a prompt on each line; `-` reads standard input"""
    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    out: Path = Path("outputs")
    """folder for the pictures"""
    negative_prompt: str = ""
    steps: int = Field(30, ge=1)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    """1 is no guidance; the scale of the model's own sample grids when left out"""
    guidance: GuidanceConfig = GuidanceConfig()
    sampler: str = "dpmpp_2m"
    """ddpm, ddim, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde, unipc or lcm"""
    eta: float | None = Field(None, ge=0, le=1)
    """fresh noise in each step; the sampler's own when left out"""
    grid: str = "trailing"
    """times of the steps: trailing, leading, linspace, karras, exponential, log_snr, beta, or a list as 1,0.7,0.3"""
    seed: int = Field(0, ge=0, lt=2**62)
    """of the first picture; picture i has seed + i"""
    num_images: int = Field(1, ge=1)
    """pictures of each prompt"""
    batch_size: int = Field(8, ge=1)
    """pictures painted together"""
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    variation: tuple[int, float] | None = None
    """a second seed, and how far from 0 to 1 the first noise goes towards its own"""
    weaker: Path | None = None
    """a smaller or less trained model of the same kind, which guidance goes away from instead of the negative prompt"""
    tile: int | None = Field(None, ge=8)
    """decode larger latents in tiles of this side: less memory for large pictures"""
    previews: bool = False
    """keep OUT/preview.png up to date while painting: what the sampler guesses"""
    device: str | None = None
    """cpu, cuda, mps; the best there is when left out"""
    reproduce: Path | None = None
    """paint this PNG once more, from its metadata"""


def paint(config: Txt2Img, source: SourceRecord | None = None) -> list[Path]:
    """Paint, save and return the files; the grid is last when there are several pictures."""
    find_sampler(config.sampler, config.eta)
    make_folder(config.out)
    record = read_record(config) if config.reproduce else None
    prompts = [] if record else read_prompts(config)
    pipeline = Pipeline.load(find_model(config, record), device=device_of(config.device))
    print(f"{pipeline.folder}: {pipeline.kind}", file=sys.stderr)
    digest = sha256(pipeline.weights)
    asked = record.weaker if record else config.weaker
    weaker = guide(pipeline, asked) if asked else {}
    if record:
        if record.model_hash != digest:
            raise ValueError(
                f"{config.reproduce} was painted by another model ({record.model}): name that with --model"
            )
        if record.weaker_hash != weaker.get("weaker_hash"):
            raise ValueError(f"{record.weaker} is not the weaker model that guided this picture: put that one back")
        painted = [reproduce(pipeline, record)]
    else:
        models = {"model": str(pipeline.folder), "model_hash": digest, **weaker}
        painted = list(paint_all(pipeline, prompts, models, config, source))
    files = save_all(painted, config.out)
    print(f"{len(painted)} painted: {files[0]}" + (f" ... {files[-1]}" if len(files) > 1 else ""))
    return files


def make_folder(out: Path) -> None:
    """Make the folder for the pictures."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"--out {out} is a file: name a folder") from None


def guide(pipeline: Pipeline, folder: str | Path) -> dict[str, str]:
    """Let the model in `folder` be what guidance goes away from; returns what a picture's record tells of it."""
    weaker = Pipeline.load(folder, device=pipeline.device)
    pipeline.guided_by(weaker)
    return {"weaker": str(folder), "weaker_hash": sha256(weaker.weights)}


def read_record(config: Txt2Img) -> Record:
    """That of the picture to reproduce; ValueError when other settings are asked for too."""
    assert config.reproduce is not None
    defaults = Txt2Img()
    for name in Txt2Img.model_fields.keys() - BESIDE_REPRODUCE:
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"--reproduce takes all settings from {config.reproduce}: leave out {name}")
    return read_png(config.reproduce)


def read_prompts(config: Txt2Img) -> list[str]:
    """Prompts of the command line, then of the file; ValueError when there is none."""
    prompts = list(config.prompts)
    if config.prompt_file:
        source = Path(config.prompt_file)
        if config.prompt_file != "-" and (source.is_dir() or not source.exists()):
            raise ValueError(f"prompt file {source} does not exist: name a text file with a prompt on each line")
        text = sys.stdin.read() if config.prompt_file == "-" else folders.read_text(source)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"prompt file {source} is empty: write a prompt on each line")
        prompts += lines
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty: say what to paint, or leave it out")
    if not prompts:
        raise ValueError('no prompt: say what to paint, as in `python scripts/txt2img.py "a small red circle"`')
    return prompts


def find_model(config: Txt2Img, record: Record | None) -> Path:
    """The folder asked for, that of the picture to reproduce, or the newest."""
    if config.model:
        return config.model
    if record:
        return Path(record.model)
    return folders.newest("pipeline", Path("runs"), script="make demo")


def device_of(name: str | None) -> str:
    """The device asked for, or the best there is: cuda, mps or cpu; ValueError when it can not be used."""
    if name is not None:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {name} can not be used here ({reason}): leave out --device") from None
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def paint_all(
    pipeline: Pipeline, prompts: list[str], models: dict[str, str], config: Txt2Img, source: SourceRecord | None
) -> Iterator[Painted]:
    """Every picture with its record, which tells the `models` too."""
    for prompt in prompts:
        if pipeline.text is None:
            print("this model was trained without text: it paints the same under every prompt", file=sys.stderr)
            break
        if unknown := pipeline.unknown_words(prompt):
            print(f"words that no caption of this model's training had: {', '.join(unknown)}", file=sys.stderr)
    scale = config.guidance_scale
    start = source.call if source else {}
    size = start["image"].size if source else (pipeline.size, pipeline.size)
    settings = {
        "negative_prompt": config.negative_prompt,
        "steps": config.steps,
        "guidance_scale": pipeline.about.get("guidance_scale", 7.5) if scale is None else scale,
        "guidance": config.guidance,
        "sampler": config.sampler,
        "eta": config.eta,
        "grid": grid_of(config.grid),
        "width": config.width or size[0],
        "height": config.height or size[1],
        "variation": config.variation,
        "tile": config.tile,
    }
    batches = range(0, config.num_images, config.batch_size)
    steps = config.steps if not source or source.invert is not None else steps_of(source.strength, config.steps)
    with tqdm(total=len(prompts) * len(batches) * steps, unit="step", desc="painting") as bar:

        def tick(number: int, step: Step) -> None:
            bar.update()
            if config.previews:
                pictures.save(pictures.grid(pipeline.preview(step.data)), config.out / "preview.png")

        for prompt in prompts:
            for first in batches:
                count = min(config.batch_size, config.num_images - first)
                call: dict[str, Any] = {"prompt": prompt, **settings, "seed": config.seed + first, "num_images": count}
                for index, image in enumerate(pipeline(**call, **start, on_step=tick)):
                    yield image, Record(**call, index=index, source=source, **models)


def grid_of(text: str) -> str | tuple[float, ...]:
    """The name of a grid, or the times in a list."""
    if "," not in text:
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"grid {text!r} is no list of times: write them as 1,0.7,0.3") from None


def reproduce(pipeline: Pipeline, record: Record) -> Painted:
    """Paint the batch that a picture came from, since numbers differ in the last bit with its size, and pick it."""
    return pipeline(**record.call)[record.index], record


def save_all(painted: list[Painted], out: Path) -> list[Path]:
    """Write numbered PNGs after those that are there, and a grid when there are several."""
    number = 1 + max((int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()), default=-1)
    files = [out / f"{number + i:05d}.png" for i in range(len(painted))]
    for file, (image, record) in zip(files, painted, strict=True):
        save_png(file, image, record)
    if len(painted) > 1:
        files.append(out / f"grid-{number:05d}.png")
        pictures.save(pictures.grid([image for image, _ in painted]), files[-1])
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse(Txt2Img, argv, default=None, description=__doc__)
    with errors_for_people():
        paint(config)


if __name__ == "__main__":
    main()
