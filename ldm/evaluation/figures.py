"""Pictures that explain: noising, denoising, latents, guidance, changed pictures, and the curves of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.diffusion.process import Diffusion
from ldm.diffusion.samplers import SamplerStep
from ldm.imaging import image_grid, wrap_text
from ldm.pipeline import Pipeline
from ldm.pipeline.pipeline import initial_noise, tensor_to_pil


@torch.no_grad()
def noising(images: Tensor, process: Diffusion, *, shown: int = 9, scale: int = 3) -> Image.Image:
    """Each row is one of `images` (b, c, h, w) with more and more noise, from t = 0 to t = 1."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    columns = [
        process.add_noise(images, noise, torch.full((len(images),), t)) for t in torch.linspace(0, 1, shown).tolist()
    ]
    cells = torch.stack(columns, 1).flatten(0, 1).clamp(-1, 1)
    return image_grid(tensor_to_pil(cells), columns=shown, scale=scale)


@torch.no_grad()
def denoising(
    pipeline: Pipeline, prompts: Sequence[str], *, steps: int = 30, shown: int = 9, scale: int = 3, seed: int = 0
) -> Image.Image:
    """Two rows for each prompt: what the sampler holds, decoded, and the denoiser's guess of the end, step by step."""
    shown_steps = [round(i * (steps - 1) / (shown - 1)) for i in range(shown)]
    guidance_scale = pipeline.metadata.get("guidance_scale", 7.5)
    rows = []
    for prompt in prompts:
        walk: list[SamplerStep] = []

        def keep(number: int, step: SamplerStep, walk: list[SamplerStep] = walk) -> None:
            walk.append(step)

        pipeline(prompt, steps=steps, guidance_scale=guidance_scale, seed=seed, on_step=keep)
        rows += [walk[i].z for i in shown_steps] + [walk[i].denoised for i in shown_steps]
    return image_grid(tensor_to_pil(pipeline.decode(torch.cat(rows))), columns=shown, scale=scale)


@torch.no_grad()
def latents(pipeline: Pipeline, images: Tensor, *, scale: int = 3) -> Image.Image:
    """Each row is an image, its reconstruction, and the channels of its latent in grey, enlarged."""
    assert pipeline.vae is not None, "a model in pixels has no latents"
    mean = pipeline.vae.encode(images).mean
    standard = pipeline.vae.standardize(mean)
    channels = torch.nn.functional.interpolate(standard / 3, scale_factor=images.shape[-1] / mean.shape[-1])
    rows = []
    for image, output, planes in zip(images, pipeline.vae.decode(mean), channels, strict=True):
        rows += [image, output.clamp(-1, 1), *planes[:, None].expand(-1, len(image), -1, -1).clamp(-1, 1)]
    return image_grid(tensor_to_pil(torch.stack(rows)), columns=2 + channels.shape[1], scale=scale)


def guidance(
    pipeline: Pipeline, prompt: str, scales: Sequence[float], *, seeds: int = 6, scale: int = 3
) -> Image.Image:
    """Each row paints the prompt with the same seeds under another guidance scale."""
    shape = pipeline.latent_shape(pipeline.resolution, pipeline.resolution)
    noise, names = initial_noise(shape, list(range(seeds))).to(pipeline.device), [prompt] * seeds
    rows = []
    for guidance_scale in scales:
        with torch.no_grad():
            z = pipeline.sample(
                noise, names, [""] * seeds, seeds=list(range(seeds)), steps=30, guidance_scale=guidance_scale
            )
            rows += tensor_to_pil(pipeline.decode(z))
    return with_row_labels(image_grid(rows, columns=seeds, scale=scale), [f"scale {value:g}" for value in scales])


def edits(pipeline: Pipeline, described: str, wanted: str, edits: Sequence[str], *, scale: int = 3) -> Image.Image:
    """A picture of `described` that is changed: by strength and under a mask to `wanted`, by inversion to each edit."""
    guided = {"guidance_scale": pipeline.metadata.get("guidance_scale", 7.5)}
    image, side = pipeline(described, **guided, seed=1)[0], pipeline.resolution
    mask = Image.new("L", image.size)
    mask.paste(255, (side // 2, side // 2, side, side))
    columns = len(edits) + 1
    strengths = [i / (columns - 1) for i in range(columns)]
    rows = [pipeline(wanted, image=image, strength=strength, **guided, seed=2)[0] for strength in strengths]
    filled = pipeline(wanted, image=image, mask=mask, strength=1.0, num_images=columns - 2, **guided, seed=3)
    rows += [image, mask.convert(image.mode), *filled]
    inverted: dict[str, Any] = {"image": image, "inversion_prompt": described, "sampler": "euler", "steps": 10}
    rows += [image, *(pipeline(edit, **inverted, **guided)[0] for edit in edits)]
    labels = ["strength 0 to 1", "what a mask covers", "from its own noise, in other words"]
    return with_row_labels(image_grid(rows, columns=columns, scale=scale), labels, width=110)


def prompts(pipeline: Pipeline, texts: Sequence[str], *, seeds: int = 4, scale: int = 3) -> Image.Image:
    """Each row paints a prompt with the seeds 0, 1, ... under the guidance that suits the model."""
    guidance_scale = pipeline.metadata.get("guidance_scale", 7.5)
    rows = [image for text in texts for image in pipeline(text, guidance_scale=guidance_scale, num_images=seeds)]
    return with_row_labels(image_grid(rows, columns=seeds, scale=scale), texts, width=160)


def with_row_labels(sheet: Image.Image, labels: Sequence[str], *, width: int = 70) -> Image.Image:
    """A grid with a label left of each row."""
    wide = Image.new("RGB", (sheet.width + width, sheet.height), "white")
    wide.paste(sheet, (width, 0))
    draw, font = ImageDraw.Draw(wide), ImageFont.load_default(size=13)
    for row, label in enumerate(labels):
        middle = (4, (row + 0.5) * sheet.height / len(labels))
        draw.text(middle, wrap_text(label, font, width - 8), font=font, fill="black", anchor="lm")
    return wide


def loss_curves(runs: Sequence[Path], path: Path) -> None:
    """Plot the losses in the log.jsonl of each run, and what it validated, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.2), squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for name in ("loss", "validation_loss", "validation_psnr", "validation_retrieval"):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                own = axis if name.endswith("loss") else axis.twinx()
                told, color = name.replace("_", " "), "C0" if name == "loss" else "C1"
                own.plot(*zip(*points, strict=True), label=told, color=color)
                if name == "validation_loss":
                    own.legend()
                else:
                    own.set_ylabel(told, color=color)
                if own is axis:
                    own.set_yscale("log")
        axis.set_title(run.name)
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
