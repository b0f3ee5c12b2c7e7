"""Measure a trained model on what it has not seen: the VAE's fidelity and, for shapes, whether prompts are obeyed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from ldm import folders
from ldm.config import ScriptConfig, errors_for_people, parse
from ldm.data import DataConfig, open_dataset, shapes
from ldm.data.order import image_batches
from ldm.diffusion.samplers import find_sampler
from ldm.evaluation import metrics
from ldm.evaluation.classifier import RECIPE, AttributeClassifier, check_classifier, count_right, train_classifier
from ldm.files import write_text
from ldm.pipeline import Pipeline, initial_noise
from ldm.vae.losses import psnr, ssim
from ldm.weights import load_weights, save_weights


class Evaluate(ScriptConfig):
    """Settings of evaluate."""

    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    count: int = Field(240, ge=2)
    """held-out images, and held-out captions"""
    steps: int = Field(30, ge=1)
    guidance_scale: float | None = None
    """the scale of the model's own sample grids when left out"""
    sampler: str = "dpmpp_2m"
    batch_size: int = Field(60, ge=1)
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Measure, print a table and write evaluation.json beside the model folder."""
    find_sampler(config.sampler, None)
    folder = config.model or folders.newest("pipeline", Path("runs"), script="make demo")
    pipeline = Pipeline.load(folder, device=config.device)
    if "data" not in pipeline.about:
        raise ValueError(f"{folder} does not tell its data, as it was not trained here: evaluate has nothing held out")
    data = DataConfig(**pipeline.about["data"])
    report: dict[str, metrics.Estimate] = {}
    if pipeline.vae is not None:
        report |= vae_fidelity(pipeline, data, config)
    if data.source == "shapes" and data.channels == 3 and pipeline.text is not None:
        report |= prompt_accuracy(pipeline, folder, config)
    if not report:
        raise ValueError(
            f"{folder} has neither a VAE nor prompts about shapes: there is nothing that evaluate can measure"
        )
    settings = {"guidance_scale": guidance(pipeline, config), "steps": config.steps, "sampler": config.sampler}
    values = {"model": str(folder), **settings, **{name: e._asdict() for name, e in report.items()}}
    write_text(folder.parent / "evaluation.json", json.dumps(values, indent=2))
    print(table(report))
    return values


def vae_fidelity(pipeline: Pipeline, data: DataConfig, config: Evaluate) -> dict[str, metrics.Estimate]:
    """PSNR (dB) and SSIM of reconstructed held-out images."""
    assert pipeline.vae is not None
    found: dict[str, list[float]] = {"VAE PSNR, dB": [], "VAE SSIM": []}
    held_out = open_dataset(data, "test", seed=config.seed)
    for batch in image_batches(held_out, held_out.spread(config.count), batch_size=config.batch_size):
        images = batch.to(config.device)
        with torch.no_grad():
            output = pipeline.vae.decode(pipeline.vae.encode(images).mean).clamp(-1, 1)
        found["VAE PSNR, dB"] += psnr(output, images).tolist()
        found["VAE SSIM"] += ssim(output, images).tolist()
    return {name: metrics.mean(values) for name, values in found.items()}


def prompt_accuracy(pipeline: Pipeline, folder: Path, config: Evaluate) -> dict[str, metrics.Estimate]:
    """Share of pictures, painted under captions of unseen combinations, that show each attribute and all five."""
    classifier = load_classifier(folder.parent.parent, pipeline.size)
    scenes = shapes.scenes("test")
    chosen = [scenes[i * len(scenes) // config.count % len(scenes)] for i in range(config.count)]
    captions = [shapes.captions(scene)[i % len(shapes.captions(scene))] for i, scene in enumerate(chosen)]
    images = quantized(paint(pipeline, captions, config)).cpu()
    right = count_right(classifier, images, chosen)
    return {f"prompt accuracy, {name}": metrics.proportion(n, len(chosen)) for name, n in right.items()}


def paint(pipeline: Pipeline, captions: list[str], config: Evaluate) -> Tensor:
    """Pictures of captions, (b, c, h, w) in [-1, 1]; caption i has seed + i."""
    shape = pipeline.latent_shape(pipeline.size, pipeline.size)
    painted = []
    for first in tqdm(range(0, len(captions), config.batch_size), desc="painting", unit="batch"):
        prompts = captions[first : first + config.batch_size]
        seeds = [config.seed + first + i for i in range(len(prompts))]
        with torch.no_grad():
            latents = pipeline.sample(
                initial_noise(shape, seeds).to(config.device),
                prompts,
                [""] * len(prompts),
                seeds=seeds,
                steps=config.steps,
                guidance_scale=guidance(pipeline, config),
                sampler=config.sampler,
            )
            painted.append(pipeline.decode(latents))
    return torch.cat(painted)


def guidance(pipeline: Pipeline, config: Evaluate) -> float:
    """The scale asked for, or the model's own."""
    return pipeline.about["guidance_scale"] if config.guidance_scale is None else config.guidance_scale


def quantized(images: Tensor) -> Tensor:
    """As a PNG would give them back."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


def load_classifier(folder: Path, size: int) -> AttributeClassifier:
    """The classifier of this picture size, trained at the first call; it must prove itself every time."""
    path = folder / f"classifier-{RECIPE}-{size}.safetensors"
    if path.is_file():
        classifier = AttributeClassifier()
        load_weights(classifier, path)
        classifier.eval()
    else:
        print(f"training the classifier that reads shapes at {size} pixels, once, into {path}")
        classifier = train_classifier(size)
        save_weights(classifier, path)
    share = check_classifier(classifier, size)
    print(f"the classifier reads {share:.1%} of held-out real renders without a mistake")
    return classifier


def table(report: dict[str, metrics.Estimate]) -> str:
    """One line for each measure, with its 95 % confidence interval."""
    width = max(len(name) for name in report)
    return "\n".join(
        f"{name:{width}}  {e.value:8.3f}  [{e.low:.3f}, {e.high:.3f}]  n = {e.samples}" for name, e in report.items()
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse(Evaluate, argv, default=None, description=__doc__)
    with errors_for_people():
        evaluate(config)


if __name__ == "__main__":
    main()
