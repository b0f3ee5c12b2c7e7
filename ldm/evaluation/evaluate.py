"""Measuring a trained model: the VAE's fidelity on held-out images, and whether held-out prompts are followed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from tqdm import tqdm

from ldm.cli import ScriptConfig
from ldm.data import DataConfig, open_dataset
from ldm.data.sources import shapes
from ldm.diffusion.samplers import get_sampler
from ldm.evaluation.classifier import count_correct, load_classifier
from ldm.imaging import pil_to_tensor, tensor_to_pil
from ldm.io.atomic import check_folder, write_text
from ldm.io.model_dir import latest_model, model_kind, read_manifest
from ldm.pipeline import Pipeline
from ldm.pipeline.load import PipelineManifest, load_components
from ldm.vae.losses import psnr, ssim

Z95 = 1.959964  # of the standard normal


class EvaluateConfig(ScriptConfig):
    """Settings of evaluate."""

    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    data: DataConfig = DataConfig(source="")
    """what is left out is as in the training of the model"""
    out: Path | None = None
    """folder for evaluation.json; the one that the model folder is in when left out"""
    num_samples: int = Field(240, ge=2)
    """held-out images, and held-out captions"""
    steps: int = Field(30, ge=1)
    guidance_scale: float | None = None
    """the scale of the model's own sample images when left out, 7.5 where it has none"""
    sampler: str = "dpmpp_2m"
    batch_size: int = Field(60, ge=1)
    seed: int = 0
    device: str | None = None
    """cpu, cuda or mps; the best available one when left out"""

    def values_below(self) -> dict[str, Any]:
        """The newest model, and the data that the model was trained on, or its resolution."""
        path = self.model or latest_model("pipeline", Path("runs"), script="make demo")
        is_ours = model_kind(path) is not None
        model = read_manifest(path, "pipeline", PipelineManifest.from_dict) if is_ours else load_components(path)
        return {"model": path, "data": model.metadata.get("data", {"source": "", "resolution": model.resolution})}


class Estimate(NamedTuple):
    """A value with its 95 % confidence interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    samples: int


def evaluate(config: EvaluateConfig) -> None:
    """Measure, print a table and write evaluation.json."""
    get_sampler(config.sampler, None)
    folder, data = config.model, config.data
    if folder is None or not data.source:
        raise ValueError(f"{folder} does not name its data, as it was not trained here: pass --data.source")
    out = folder.parent if config.out is None else config.out
    check_folder(out, "--out")
    pipeline = Pipeline.load(folder, device=config.device)
    report: dict[str, Estimate] = {}
    if pipeline.vae is not None:
        report |= vae_fidelity(pipeline, data, config)
    if data.source == "shapes" and data.channels == 3 and pipeline.text is not None:
        report |= prompt_accuracy(pipeline, folder, config)
    elif report:
        print(f"only the VAE is measured: generated images are measured on shapes alone, not on {data.source}")
    if not report:
        raise ValueError(f"{folder} has neither a VAE nor prompts about shapes: evaluate has nothing to measure")
    scale = pipeline.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
    settings = {"data": data.source, "guidance_scale": scale, "steps": config.steps, "sampler": config.sampler}
    values = {"model": str(folder), **settings, **{name: e._asdict() for name, e in report.items()}}
    write_text(out / "evaluation.json", json.dumps(values, indent=2))
    print(table(report))


def vae_fidelity(pipeline: Pipeline, data: DataConfig, config: EvaluateConfig) -> dict[str, Estimate]:
    """PSNR (dB) and SSIM of reconstructed held-out images."""
    assert pipeline.vae is not None
    data.check_channels(pipeline.vae.config.image_channels)
    scores: dict[str, list[float]] = {"VAE PSNR, dB": [], "VAE SSIM": []}
    held_out = open_dataset(data, "test", seed=config.seed)
    print(f"at {data.resolution} pixels: {held_out.describe()}")
    for batch in held_out.spread_images(config.num_samples, batch_size=config.batch_size):
        images = batch.to(pipeline.device)
        output = pipeline.vae.decode(pipeline.vae.encode(images).mean).clamp(-1, 1)
        scores["VAE PSNR, dB"] += psnr(output, images).tolist()
        scores["VAE SSIM"] += ssim(output, images).tolist()
    return {name: mean_ci(values) for name, values in scores.items()}


def prompt_accuracy(pipeline: Pipeline, folder: Path, config: EvaluateConfig) -> dict[str, Estimate]:
    """Share of images that show each attribute, and all five: caption i, of an unseen combination, has seed + i."""
    classifier = load_classifier(folder.parent.parent, pipeline.resolution)
    count, scenes = config.num_samples, shapes.scenes("test")
    chosen = [scenes[i * len(scenes) // count % len(scenes)] for i in range(count)]
    captions = [shapes.captions(scene)[i % len(shapes.captions(scene))] for i, scene in enumerate(chosen)]
    images = []
    for first in tqdm(range(0, count, config.batch_size), desc="generating", unit="batch"):
        batch = captions[first : first + config.batch_size]
        seeds = range(config.seed + first, config.seed + first + len(batch))
        pixels = pipeline.sample(
            batch, seeds, steps=config.steps, guidance_scale=config.guidance_scale, sampler=config.sampler
        )
        images += tensor_to_pil(pixels)
    correct = count_correct(classifier, torch.stack([pil_to_tensor(image, 3) for image in images]), chosen)
    return {f"prompt accuracy, {name}": proportion_ci(n, count) for name, n in correct.items()}


def table(report: dict[str, Estimate]) -> str:
    """One line for each measure, with its 95 % confidence interval."""
    width = max(len(name) for name in report)
    return "\n".join(
        f"{name:{width}}  {e.value:8.3f}  [{e.low:.3f}, {e.high:.3f}]  n = {e.samples}" for name, e in report.items()
    )


def proportion_ci(successes: int, count: int) -> Estimate:
    """Share of successes with Wilson's score interval (Wilson 1927)."""
    share, z2 = successes / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Estimate(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)), count)


def mean_ci(values: Sequence[float]) -> Estimate:
    """Mean with its normal interval; the values are independent samples."""
    count = len(values)
    if count < 2:
        raise ValueError(f"a confidence interval needs at least two samples, not {count}")
    average = sum(values) / count
    deviation = math.sqrt(sum((v - average) ** 2 for v in values) / (count - 1))
    half = Z95 * deviation / math.sqrt(count)
    return Estimate(average, average - half, average + half, count)
