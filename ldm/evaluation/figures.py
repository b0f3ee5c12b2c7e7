"""Figures that explain: noising, denoising, latents, guidance, edited images, and the curves of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.cli import ScriptConfig
from ldm.data import DataConfig, open_dataset
from ldm.diffusion.process import Diffusion
from ldm.diffusion.samplers import SamplerStep
from ldm.imaging import captioned_grid, image_grid, save_image, tensor_to_pil
from ldm.io.atomic import check_folder
from ldm.io.model_dir import latest_model
from ldm.labels import LabelFont
from ldm.pipeline import Pipeline

SCALE = 3  # by which images are enlarged
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
    return image_grid(tensor_to_pil(cells), columns=columns, scale=SCALE)


def denoising(pipeline: Pipeline, prompts: Sequence[str], *, steps: int = 30, columns: int = 9) -> Image.Image:
    """Two rows for each prompt, step by step: the decoded z_t, and the denoised latents (the predicted x0)."""
    indices = [1 + round(i * (steps - 1) / (columns - 1)) for i in range(columns)]
    rows = []
    for prompt in prompts:
        history: dict[int, SamplerStep] = {}
        pipeline(prompt, steps=steps, on_step=history.__setitem__)
        rows += [history[i].z for i in indices] + [history[i].denoised for i in indices]
    return image_grid(tensor_to_pil(pipeline.decode(torch.cat(rows))), columns=columns, scale=SCALE)


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
    return image_grid(tensor_to_pil(torch.stack(rows)), columns=2 + channels.shape[1], scale=SCALE)


def guidance(pipeline: Pipeline, prompt: str, scales: Sequence[float], *, seeds: int = 6) -> Image.Image:
    """Each row has the prompt with the same seeds under another guidance scale."""
    images = {scale: pipeline.sample([prompt] * seeds, range(seeds), guidance_scale=scale) for scale in scales}
    return labelled_rows({f"scale {scale:g}": tensor_to_pil(row) for scale, row in images.items()})


def edits(pipeline: Pipeline, described: str, wanted: str, edits: Sequence[str]) -> Image.Image:
    """An image of `described`, edited: by strength and under a mask to `wanted`, by inversion to each edit."""
    image, side = pipeline(described, seed=1)[0], pipeline.resolution
    mask = Image.new("L", image.size)
    mask.paste(255, (side // 2, side // 2, side, side))
    count = len(edits)
    strengths = [i / count for i in range(count + 1)]
    filled = pipeline(wanted, image=image, mask=mask, strength=1.0, num_images=count - 1, seed=3)
    inverted: dict[str, Any] = {"image": image, "inversion_prompt": described, "sampler": "euler", "steps": 10}
    rows = {
        "strength 0 to 1": [pipeline(wanted, image=image, strength=s, seed=2)[0] for s in strengths],
        "inpainting under a mask": [image, mask, *filled],
        "inversion, then another prompt": [image, *(pipeline(edit, **inverted)[0] for edit in edits)],
    }
    return labelled_rows(rows, width=110)


def labelled_rows(rows: Mapping[str, Sequence[Image.Image]], *, width: int = 70) -> Image.Image:
    """A grid of rows of images, each with its label to the left, `width` pixels wide."""
    images = [image for row in rows.values() for image in row]
    grid = image_grid(images, columns=len(images) // len(rows), scale=SCALE)
    wide = Image.new("RGB", (grid.width + width, grid.height), "white")
    wide.paste(grid, (width, 0))
    font = LabelFont(rows, size=13)
    for row, text in enumerate(rows):
        label = font.label(text, width - 8)
        wide.paste(label, (4, round((row + 0.5) * grid.height / len(rows) - label.height / 2)))
    return wide


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

PROMPTS = (
    "a large red star in the center on a white background",
    "a small blue ring in the top left corner on a yellow background",
    "a large green triangle in the bottom right corner on a black background",
    "a small white cross in the center on a purple background",
    "a large orange circle in the top right corner on a blue background",
    "a small black square in the bottom left corner on an orange background",
    "a large purple ring in the center on a green background",
    "a small yellow star in the bottom right corner on a red background",
)
EDITED = (
    "a large red circle in the top left corner on a blue background",
    "a large yellow star in the bottom right corner on a blue background",
    (
        "a large green circle in the top left corner on a blue background",
        "a large red star in the top left corner on a blue background",
        "a large red circle in the top left corner on a yellow background",
        "a small red circle in the top left corner on a blue background",
        "a large red circle in the top right corner on a blue background",
    ),
)


class FiguresConfig(ScriptConfig):
    """Settings of make_figures."""

    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    out: Path = Path("docs/images")
    prompts: tuple[str, ...] = ()
    """draw these alone, one a row with the seeds 0 to 3, as prompts.png"""


def make_figures(config: FiguresConfig) -> None:
    """Write samples, noising, denoising, latents, guidance and edits as PNG files, or prompts alone."""
    check_folder(config.out, "--out")
    folder = config.model or latest_model("pipeline", Path("runs"), script="make demo")
    pipeline = Pipeline.load(folder)
    if config.prompts:
        rows = {prompt: pipeline(prompt, num_images=4) for prompt in config.prompts}
        save_image(labelled_rows(rows, width=160), config.out / "prompts.png")
        return
    held_out = open_dataset(DataConfig(**pipeline.metadata["data"]), "test", seed=0)
    images = next(held_out.spread_images(3))
    samples = [pipeline(prompt, seed=seed)[0] for seed, prompt in enumerate(PROMPTS)]
    figures = {
        "samples": captioned_grid(samples, PROMPTS, columns=4),
        "noising": noising(images, pipeline.diffusion),
        "denoising": denoising(pipeline, PROMPTS[:3]),
        "guidance": guidance(pipeline, PROMPTS[1], (0, 1, pipeline.default_guidance_scale, 12)),
        "edits": edits(pipeline, *EDITED),
    }
    if pipeline.vae is not None:
        figures["latents"] = latents(pipeline, images)
    for name, figure in figures.items():
        save_image(figure, config.out / f"{name}.png")
