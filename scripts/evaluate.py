"""Measure a trained model on what it has not seen: the VAE's fidelity and, for shapes, whether prompts are obeyed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from ldm.cli import ScriptConfig, exit_on_user_error, parse_cli
from ldm.data import DataConfig, open_dataset
from ldm.data.batch_sampler import image_batches
from ldm.data.sources import shapes
from ldm.diffusion.samplers import get_sampler
from ldm.evaluation import intervals
from ldm.evaluation.classifier import (
    CLASSIFIER_VERSION,
    AttributeClassifier,
    check_classifier,
    count_correct,
    train_classifier,
)
from ldm.io import model_dir
from ldm.io.atomic import write_text
from ldm.io.tensors import load_weights, save_weights
from ldm.pipeline import Pipeline
from ldm.pipeline.pipeline import initial_noise
from ldm.vae.losses import psnr, ssim


class EvaluateConfig(ScriptConfig):
    """Settings of evaluate."""

    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    num_samples: int = Field(240, ge=2)
    """held-out images, and held-out captions"""
    steps: int = Field(30, ge=1)
    guidance_scale: float | None = None
    """the scale of the model's own sample grids when left out"""
    sampler: str = "dpmpp_2m"
    batch_size: int = Field(60, ge=1)
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print a table and write evaluation.json beside the model folder."""
    get_sampler(config.sampler, None)
    folder = config.model or model_dir.latest_model("pipeline", Path("runs"), script="make demo")
    pipeline = Pipeline.load(folder, device=config.device)
    if "data" not in pipeline.metadata:
        raise ValueError(f"{folder} does not tell its data, as it was not trained here: evaluate has nothing held out")
    data = DataConfig(**pipeline.metadata["data"])
    report: dict[str, intervals.Estimate] = {}
    if pipeline.vae is not None:
        report |= vae_fidelity(pipeline, data, config)
    if data.source == "shapes" and data.channels == 3 and pipeline.text is not None:
        report |= prompt_accuracy(pipeline, folder, config)
    if not report:
        raise ValueError(
            f"{folder} has neither a VAE nor prompts about shapes: there is nothing that evaluate can measure"
        )
    settings = {"guidance_scale": guidance_scale(pipeline, config), "steps": config.steps, "sampler": config.sampler}
    values = {"model": str(folder), **settings, **{name: e._asdict() for name, e in report.items()}}
    write_text(folder.parent / "evaluation.json", json.dumps(values, indent=2))
    print(table(report))
    return values


def vae_fidelity(pipeline: Pipeline, data: DataConfig, config: EvaluateConfig) -> dict[str, intervals.Estimate]:
    """PSNR (dB) and SSIM of reconstructed held-out images."""
    assert pipeline.vae is not None
    found: dict[str, list[float]] = {"VAE PSNR, dB": [], "VAE SSIM": []}
    held_out = open_dataset(data, "test", seed=config.seed)
    for batch in image_batches(held_out, held_out.evenly_spaced(config.num_samples), batch_size=config.batch_size):
        images = batch.to(config.device)
        with torch.no_grad():
            output = pipeline.vae.decode(pipeline.vae.encode(images).mean).clamp(-1, 1)
        found["VAE PSNR, dB"] += psnr(output, images).tolist()
        found["VAE SSIM"] += ssim(output, images).tolist()
    return {name: intervals.mean_ci(values) for name, values in found.items()}


def prompt_accuracy(pipeline: Pipeline, folder: Path, config: EvaluateConfig) -> dict[str, intervals.Estimate]:
    """Share of pictures, painted under captions of unseen combinations, that show each attribute and all five."""
    classifier = load_classifier(folder.parent.parent, pipeline.resolution)
    scenes = shapes.scenes("test")
    chosen = [scenes[i * len(scenes) // config.num_samples % len(scenes)] for i in range(config.num_samples)]
    captions = [shapes.captions(scene)[i % len(shapes.captions(scene))] for i, scene in enumerate(chosen)]
    images = quantized(generate(pipeline, captions, config)).cpu()
    right = count_correct(classifier, images, chosen)
    return {f"prompt accuracy, {name}": intervals.proportion_ci(n, len(chosen)) for name, n in right.items()}


def generate(pipeline: Pipeline, captions: list[str], config: EvaluateConfig) -> Tensor:
    """Pictures of captions, (b, c, h, w) in [-1, 1]; caption i has seed + i."""
    shape = pipeline.latent_shape(pipeline.resolution, pipeline.resolution)
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
                guidance_scale=guidance_scale(pipeline, config),
                sampler=config.sampler,
            )
            painted.append(pipeline.decode(latents))
    return torch.cat(painted)


def guidance_scale(pipeline: Pipeline, config: EvaluateConfig) -> float:
    """The scale asked for, or the model's own."""
    return pipeline.metadata["guidance_scale"] if config.guidance_scale is None else config.guidance_scale


def quantized(images: Tensor) -> Tensor:
    """As a PNG would give them back."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


def load_classifier(folder: Path, size: int) -> AttributeClassifier:
    """The classifier of this picture size, trained at the first call; it must prove itself every time."""
    path = folder / f"classifier-{CLASSIFIER_VERSION}-{size}.safetensors"
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


def table(report: dict[str, intervals.Estimate]) -> str:
    """One line for each measure, with its 95 % confidence interval."""
    width = max(len(name) for name in report)
    return "\n".join(
        f"{name:{width}}  {e.value:8.3f}  [{e.low:.3f}, {e.high:.3f}]  n = {e.samples}" for name, e in report.items()
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(EvaluateConfig, argv, default=None, description=__doc__)
    with exit_on_user_error():
        evaluate(config)


if __name__ == "__main__":
    main()
