"""Figures that explain: noising, denoising, seeds, latents, guidance, edited images, and the curves of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ldm.cli import ScriptConfig
from ldm.config import Config
from ldm.data import DataConfig, open_dataset
from ldm.diffusion.guidance import GuidanceConfig
from ldm.diffusion.process import Diffusion
from ldm.diffusion.timesteps import make_timesteps
from ldm.imaging import captioned_grid, image_grid, save_image, tensor_to_pil
from ldm.io.atomic import check_folder
from ldm.io.model_dir import latest_model
from ldm.labels import LabelFont
from ldm.pipeline import Pipeline
from ldm.pipeline.inputs import initial_noise

SIDE = 96  # pixels that an image is enlarged to, about
FRAME_MS, LAST_FRAME_MS = 200, 3000  # how long the frames of a film are shown
FILM_COLORS = 64  # of a frame: noise does not compress, so its colours decide the size of the file
CURVES = {  # what is drawn of a log, with its colour
    "loss": "C0",
    "validation_loss": "C1",
    "validation_loss_shuffled": "C2",
    "validation_loss_empty": "C3",
    "validation_psnr": "C1",
    "validation_retrieval": "C1",
}


def noising(images: Tensor, diffusion: Diffusion, *, columns: int = 9) -> Image.Image:
    """Each row is one of `images` (b, c, h, w) with more and more noise, from t = 0 to t = 1."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    ts = [torch.full((len(images),), t) for t in torch.linspace(0, 1, columns).tolist()]
    cells = torch.stack([diffusion.add_noise(images, noise, t) for t in ts], 1).flatten(0, 1).clamp(-1, 1)
    return enlarged_grid(tensor_to_pil(cells), columns=columns)


class SamplingState(NamedTuple):
    """What the network gets in a step of sampling, and what it makes of it; both are (b, c, h, w), one a prompt."""

    t: float
    z: Tensor  # z_t
    denoised: Tensor  # the x0 that is predicted from it


def sampling_states(pipeline: Pipeline, prompts: Sequence[str], *, steps: int) -> list[SamplingState]:
    """All states from noise to t = 0, of prompt i with seed i, without guidance: each guess is an average then."""
    seeds, side = range(len(prompts)), pipeline.resolution
    z = initial_noise(pipeline.latent_shape(side, side), seeds).to(pipeline.device)
    negative = [""] * len(prompts)
    sampling = pipeline.stream(z, list(prompts), negative, seeds=seeds, steps=steps, guidance_scale=1.0)
    states = []
    ts = make_timesteps(pipeline.diffusion, steps, "trailing").tolist()
    for t, step in zip(ts[:-1], sampling, strict=True):
        states.append(SamplingState(t, z, step.denoised))
        z = step.z
    return [*states, SamplingState(0.0, z, z)]


def denoising(pipeline: Pipeline, prompts: Sequence[str], *, steps: int = 30, columns: int = 9) -> Image.Image:
    """Two rows for each prompt, step by step: the decoded z_t, and the denoised latents (the predicted x0)."""
    states = sampling_states(pipeline, prompts, steps=steps)
    chosen = [states[round(i * steps / (columns - 1))] for i in range(columns)]
    rows = torch.stack([torch.stack([s.z, s.denoised], 1) for s in chosen], 2)  # (prompts, 2, columns, c, h, w)
    return enlarged_grid(tensor_to_pil(pipeline.decode(rows.flatten(0, 2))), columns=columns)


def denoising_film(pipeline: Pipeline, prompts: Sequence[str], *, steps: int = 30) -> list[Image.Image]:
    """Every second state of sampling, and the last, labelled with t: beside each prompt z_t, decoded, and the guess."""
    states, frames = sampling_states(pipeline, prompts, steps=steps), []
    for state in states[::-2][::-1]:
        pairs = torch.stack([state.z, state.denoised], 1).flatten(0, 1)
        images = tensor_to_pil(pipeline.decode(pairs))
        rows = {prompt: images[2 * i : 2 * i + 2] for i, prompt in enumerate(prompts)}
        frames.append(headed(labelled_rows(rows, width=150), f"t = {state.t:.3f}: z_t, and the predicted x0"))
    return frames


def save_film(frames: Sequence[Image.Image], path: Path) -> None:
    """Write an animated GIF that loops and holds its last frame; three prompts of 64 pixels take less than 1 MiB."""
    first, *others = [frame.quantize(FILM_COLORS, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    save_image(first, path, save_all=True, append_images=others, duration=durations, loop=0)


def seeds(pipeline: Pipeline, caption: str, *, count: int = 8) -> Image.Image:
    """A row of one caption under the seeds 0, 1, ...: what it leaves open differs."""
    return labelled_rows({caption: pipeline(caption, num_images=count)}, width=110)


def latents(pipeline: Pipeline, images: Tensor) -> Image.Image:
    """Each row is an image, its reconstruction, and the channels of its latent in grey, enlarged."""
    assert pipeline.vae is not None, "a model in pixels has no latents"
    images = images.to(pipeline.device)
    mean = pipeline.vae.encode(images).mean
    standard = pipeline.vae.standardize(mean)
    channels = torch.nn.functional.interpolate(standard / 3, scale_factor=images.shape[-1] / mean.shape[-1])
    rows = []
    for image, output, planes in zip(images, pipeline.vae.decode(mean), channels, strict=True):
        rows += [image, output.clamp(-1, 1), *planes[:, None].expand(-1, len(image), -1, -1).clamp(-1, 1)]
    return enlarged_grid(tensor_to_pil(torch.stack(rows)), columns=2 + channels.shape[1])


def guidance(pipeline: Pipeline, prompt: str, scales: Sequence[float], *, seeds: int = 6) -> Image.Image:
    """Each row has the prompt with the same seeds under another guidance scale, which is used at all t."""
    everywhere, images = GuidanceConfig(interval=(0, 1)), {}
    for scale in scales:
        images[scale] = pipeline.sample([prompt] * seeds, range(seeds), guidance_scale=scale, guidance=everywhere)
    return labelled_rows({f"scale {scale:g}": tensor_to_pil(row) for scale, row in images.items()})


def edits(pipeline: Pipeline, captions: "EditCaptions") -> Image.Image:
    """An image, edited: by strength and under a mask to `wanted`, by inversion to each of `inverted`."""
    image, side, wanted = pipeline(captions.image, seed=1)[0], pipeline.resolution, captions.wanted
    mask = Image.new("L", image.size)
    mask.paste(255, (side // 2, side // 2, side, side))
    count = len(captions.inverted)
    strengths = [i / count for i in range(count + 1)]
    filled = pipeline(wanted, image=image, mask=mask, strength=1.0, num_images=count - 1, seed=3)
    inverted: dict[str, Any] = {"image": image, "inversion_prompt": captions.image, "sampler": "euler", "steps": 10}
    rows = {
        "strength 0 to 1": [pipeline(wanted, image=image, strength=s, seed=2)[0] for s in strengths],
        "inpainting under a mask": [image, mask, *filled],
        "inversion, then another prompt": [image, *(pipeline(edit, **inverted)[0] for edit in captions.inverted)],
    }
    return labelled_rows(rows, width=110)


def labelled_rows(rows: Mapping[str, Sequence[Image.Image]], *, width: int = 70) -> Image.Image:
    """A grid of rows of images, each with its label to the left, `width` pixels wide."""
    images = [image for row in rows.values() for image in row]
    grid = enlarged_grid(images, columns=len(images) // len(rows))
    wide = Image.new("RGB", (grid.width + width, grid.height), "white")
    wide.paste(grid, (width, 0))
    font = LabelFont(rows, size=13)
    for row, text in enumerate(rows):
        label = font.label(text, width - 8)
        wide.paste(label, (4, round((row + 0.5) * grid.height / len(rows) - label.height / 2)))
    return wide


def enlarged_grid(images: Sequence[Image.Image], *, columns: int) -> Image.Image:
    """Images in rows, small ones enlarged."""
    return image_grid(images, columns=columns, scale=max(1, round(SIDE / images[0].width)))


def headed(image: Image.Image, text: str) -> Image.Image:
    """With a line of text above it."""
    label = LabelFont([text], size=13).label(text, image.width - 8, lines=1)
    whole = Image.new("RGB", (image.width, image.height + label.height + 8), "white")
    whole.paste(label, (4, 4))
    whole.paste(image, (0, label.height + 8))
    return whole


def loss_curves(runs: Sequence[Path], path: Path) -> None:
    """Plot the losses and validation scores in the log.jsonl of each run, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(runs), 3.2))
    axes = figure.subplots(1, len(runs), squeeze=False)
    for left, run in zip(axes[0], runs, strict=True):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for name, color in CURVES.items():
            if points := [(line["step"], line[name]) for line in lines if name in line]:
                axis = left if "loss" in name else left.twinx()
                label = name.replace("_", " ")
                marker = None if name == "loss" else "."  # a validation may be the only one
                axis.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
                if "loss" not in name:
                    axis.set_ylabel(label, color=color)
        left.set_yscale("log")
        left.set_ylabel("loss", color=CURVES["loss"])
        if len(left.lines) > 1:
            left.legend()
        left.set_title(run.name)
        left.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# All figures of the documentation.


class EditCaptions(Config):
    """What an image is edited from and to."""

    image: str
    """caption of the image"""
    wanted: str
    """caption of what strength and inpainting make of it"""
    inverted: tuple[str, ...] = Field(min_length=2)
    """captions of what inversion makes of it"""


class FiguresConfig(ScriptConfig):
    """Settings of make_figures."""

    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    out: Path = Path("docs/images")
    captions: tuple[str, ...] = ()
    """of the sample grid; the first three are denoised"""
    open_caption: str = ""
    """a caption that leaves something open, which the seeds then decide"""
    columns: int = Field(4, ge=1)
    """of the sample grid"""
    edit: EditCaptions | None = None
    prompts: tuple[str, ...] = ()
    """draw these alone, one a row with the seeds 0 to 3, as prompts.png"""


def make_figures(config: FiguresConfig) -> None:
    """Write all figures as image files, or prompts alone."""
    check_folder(config.out, "--out")
    folder = config.model or latest_model("pipeline", Path("runs"), script="make demo")
    pipeline = Pipeline.load(folder)
    if config.prompts:
        rows = {prompt: pipeline(prompt, num_images=4) for prompt in config.prompts}
        save_image(labelled_rows(rows, width=160), config.out / "prompts.png")
        return
    if not config.captions or not config.open_caption:
        raise ValueError("captions, open_caption: pass those of a recipe, --config configs/characters/figures.yaml")
    if "data" not in pipeline.metadata:
        raise ValueError(f"{folder} does not name its data, as it was not trained here: pass --prompts to draw alone")
    held_out = open_dataset(DataConfig(**pipeline.metadata["data"]), "test", seed=0)
    images, captions = next(held_out.spread_images(3)), config.captions
    samples = [pipeline(caption, seed=seed)[0] for seed, caption in enumerate(captions)]
    figures = {
        "samples": captioned_grid(samples, captions, columns=config.columns),
        "noising": noising(images, pipeline.diffusion),
        "denoising": denoising(pipeline, captions[:3]),
        "seeds": seeds(pipeline, config.open_caption),
        "guidance": guidance(pipeline, captions[1], (0, 1, pipeline.default_guidance_scale, 12)),
    }
    if config.edit is not None:
        figures["edits"] = edits(pipeline, config.edit)
    if pipeline.vae is not None:
        figures["latents"] = latents(pipeline, images)
    for name, figure in figures.items():
        save_image(figure, config.out / f"{name}.png")
    save_film(denoising_film(pipeline, captions[:3]), config.out / "denoising.gif")
