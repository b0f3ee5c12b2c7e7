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

from ldm import imaging
from ldm.cli import ScriptConfig, exit_on_user_error, parse_cli
from ldm.diffusion.guidance import GuidanceConfig
from ldm.diffusion.samplers import SamplerStep, get_sampler
from ldm.io import model_dir
from ldm.io.tensors import sha256
from ldm.pipeline import Pipeline
from ldm.pipeline.pipeline import img2img_steps
from ldm.pipeline.record import GenerationRecord, InitImageRecord, read_png, save_png

GeneratedImage = tuple[Image.Image, GenerationRecord]
REPRODUCE_FLAGS = {"reproduce", "model", "out", "device", "config"}


class Txt2ImgConfig(ScriptConfig):
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
    timesteps: str = "trailing"
    """times of the steps: trailing, leading, linspace, karras, exponential, log_snr, beta, or a list as 1,0.7,0.3"""
    seed: int = Field(0, ge=0, lt=2**62)
    """of the first picture; picture i has seed + i"""
    num_images: int = Field(1, ge=1)
    """pictures of each prompt"""
    batch_size: int = Field(8, ge=1)
    """pictures painted together"""
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    variation_seed: int | None = Field(None, ge=0, lt=2**62)
    """a second seed, towards whose noise the first one is interpolated"""
    variation_strength: float = Field(0.1, ge=0, le=1)
    """how far: 0 is the noise of `seed`, 1 that of `variation_seed`; used with a variation seed alone"""
    guide_model: Path | None = None
    """a smaller or less trained model of the same kind, which guidance goes away from instead of the negative prompt"""
    vae_tile: int | None = Field(None, ge=8)
    """decode larger latents in tiles of this side: less memory for large pictures"""
    preview: bool = False
    """keep OUT/preview.png up to date while painting: what the sampler guesses"""
    device: str | None = None
    """cpu, cuda, mps; the best there is when left out"""
    reproduce: Path | None = None
    """paint this PNG once more, from its metadata"""


def generate(config: Txt2ImgConfig, source: InitImageRecord | None = None) -> list[Path]:
    """Paint, save and return the files; the grid is last when there are several pictures."""
    get_sampler(config.sampler, config.eta)
    make_folder(config.out)
    record = read_record(config) if config.reproduce else None
    prompts = [] if record else read_prompts(config)
    pipeline = Pipeline.load(find_model(config, record), device=resolve_device(config.device))
    print(f"{pipeline.folder}: {pipeline.description}", file=sys.stderr)
    digest = sha256(pipeline.weights_file)
    asked = record.guide_model if record else config.guide_model
    weaker = load_guide_model(pipeline, asked) if asked else {}
    if record:
        if record.model_hash != digest:
            raise ValueError(
                f"{config.reproduce} was painted by another model ({record.model}): name that with --model"
            )
        if record.guide_model_hash != weaker.get("guide_model_hash"):
            raise ValueError(
                f"{record.guide_model} is not the weaker model that guided this picture: put that one back"
            )
        painted = [reproduce(pipeline, record)]
    else:
        models = {"model": str(pipeline.folder), "model_hash": digest, **weaker}
        painted = list(generate_all(pipeline, prompts, models, config, source))
    files = save_all(painted, config.out)
    print(f"{len(painted)} painted: {files[0]}" + (f" ... {files[-1]}" if len(files) > 1 else ""))
    return files


def make_folder(out: Path) -> None:
    """Make the folder for the pictures."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"--out {out} is a file: name a folder") from None


def load_guide_model(pipeline: Pipeline, folder: str | Path) -> dict[str, str]:
    """Let the model in `folder` be what guidance goes away from; returns what a picture's record tells of it."""
    weaker = Pipeline.load(folder, device=pipeline.device)
    pipeline.set_guide_model(weaker)
    return {"guide_model": str(folder), "guide_model_hash": sha256(weaker.weights_file)}


def read_record(config: Txt2ImgConfig) -> GenerationRecord:
    """That of the picture to reproduce; ValueError when other settings are asked for too."""
    assert config.reproduce is not None
    defaults = Txt2ImgConfig()
    for name in Txt2ImgConfig.model_fields.keys() - REPRODUCE_FLAGS:
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"--reproduce takes all settings from {config.reproduce}: leave out {name}")
    return read_png(config.reproduce)


def read_prompts(config: Txt2ImgConfig) -> list[str]:
    """Prompts of the command line, then of the file; ValueError when there is none."""
    prompts = list(config.prompts)
    if config.prompt_file:
        source = Path(config.prompt_file)
        if config.prompt_file != "-" and (source.is_dir() or not source.exists()):
            raise ValueError(f"prompt file {source} does not exist: name a text file with a prompt on each line")
        text = sys.stdin.read() if config.prompt_file == "-" else model_dir.read_text(source)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"prompt file {source} is empty: write a prompt on each line")
        prompts += lines
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty: say what to paint, or leave it out")
    if not prompts:
        raise ValueError('no prompt: say what to paint, as in `python scripts/txt2img.py "a small red circle"`')
    return prompts


def find_model(config: Txt2ImgConfig, record: GenerationRecord | None) -> Path:
    """The folder asked for, that of the picture to reproduce, or the newest."""
    if config.model:
        return config.model
    if record:
        return Path(record.model)
    return model_dir.latest_model("pipeline", Path("runs"), script="make demo")


def resolve_device(name: str | None) -> str:
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


def generate_all(
    pipeline: Pipeline,
    prompts: list[str],
    models: dict[str, str],
    config: Txt2ImgConfig,
    source: InitImageRecord | None,
) -> Iterator[GeneratedImage]:
    """Every picture with its record, which tells the `models` too."""
    for prompt in prompts:
        if pipeline.text is None:
            print("this model was trained without text: it paints the same under every prompt", file=sys.stderr)
            break
        if unknown := pipeline.unseen_words(prompt):
            print(f"words that no caption of this model's training had: {', '.join(unknown)}", file=sys.stderr)
    scale = config.guidance_scale
    start = source.pipeline_kwargs if source else {}
    size = start["image"].size if source else (pipeline.resolution, pipeline.resolution)
    settings = {
        "negative_prompt": config.negative_prompt,
        "steps": config.steps,
        "guidance_scale": pipeline.metadata.get("guidance_scale", 7.5) if scale is None else scale,
        "guidance": config.guidance,
        "sampler": config.sampler,
        "eta": config.eta,
        "timesteps": parse_schedule(config.timesteps),
        "width": config.width or size[0],
        "height": config.height or size[1],
        "variation_seed": config.variation_seed,
        "variation_strength": config.variation_strength,
        "vae_tile": config.vae_tile,
    }
    batches = range(0, config.num_images, config.batch_size)
    steps = (
        config.steps
        if not source or source.inversion_prompt is not None
        else img2img_steps(source.strength, config.steps)
    )
    with tqdm(total=len(prompts) * len(batches) * steps, unit="step", desc="painting") as bar:

        def tick(number: int, step: SamplerStep) -> None:
            bar.update()
            if config.preview:
                imaging.save_image(imaging.image_grid(pipeline.preview(step.denoised)), config.out / "preview.png")

        for prompt in prompts:
            for first in batches:
                count = min(config.batch_size, config.num_images - first)
                call: dict[str, Any] = {"prompt": prompt, **settings, "seed": config.seed + first, "num_images": count}
                for index, image in enumerate(pipeline(**call, **start, on_step=tick)):
                    yield image, GenerationRecord(**call, index=index, init_image=source, **models)


def parse_schedule(text: str) -> str | tuple[float, ...]:
    """The name of a grid, or the times in a list."""
    if "," not in text:
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"grid {text!r} is no list of times: write them as 1,0.7,0.3") from None


def reproduce(pipeline: Pipeline, record: GenerationRecord) -> GeneratedImage:
    """Paint the batch that a picture came from, since numbers differ in the last bit with its size, and pick it."""
    return pipeline(**record.pipeline_kwargs)[record.index], record


def save_all(painted: list[GeneratedImage], out: Path) -> list[Path]:
    """Write numbered PNGs after those that are there, and a grid when there are several."""
    number = 1 + max((int(path.stem) for path in out.glob("*.png") if path.stem.isdigit()), default=-1)
    files = [out / f"{number + i:05d}.png" for i in range(len(painted))]
    for file, (image, record) in zip(files, painted, strict=True):
        save_png(file, image, record)
    if len(painted) > 1:
        files.append(out / f"grid-{number:05d}.png")
        imaging.save_image(imaging.image_grid([image for image, _ in painted]), files[-1])
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(Txt2ImgConfig, argv, default=None, description=__doc__)
    with exit_on_user_error():
        generate(config)


if __name__ == "__main__":
    main()
