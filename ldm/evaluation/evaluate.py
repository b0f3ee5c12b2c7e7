"""Measuring a trained model on any data: its VAE's fidelity, its images against real ones, and what it memorized."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from ldm.cli import ScriptConfig
from ldm.data import DataConfig, ImageTextDataset, open_dataset
from ldm.data.inspect import find_duplicates, signature
from ldm.data.loader import sample_batches
from ldm.data.sources.base import Split, short_hash
from ldm.diffusion.samplers import get_sampler
from ldm.evaluation.classifier import AttributeClassifier, load_classifier
from ldm.evaluation.drawn import DrawnSet, drawn_set
from ldm.evaluation.estimates import Estimate, mean_ci
from ldm.evaluation.features import (
    CHOICES,
    Extractor,
    open_extractor,
    own_extractor,
    read_features,
    to_8_bits,
    write_features,
)
from ldm.evaluation.memorization import Nearest, closest_pairs, compare_distances, find_nearest
from ldm.evaluation.metrics import FD, compare_features, missing_metrics
from ldm.evaluation.prompts import background_deviation, prompt_accuracy, variety
from ldm.evaluation.report import Report, compare, plot
from ldm.evaluation.sweep import SweepPoint, write_sweep
from ldm.imaging import captioned_grid, save_image, tensor_to_pil
from ldm.io.atomic import check_folder
from ldm.io.model_dir import latest_model, model_kind, read_manifest
from ldm.io.tensors import weights_sha256
from ldm.pipeline import Pipeline
from ldm.pipeline.load import PipelineManifest, load_components
from ldm.vae.losses import psnr, ssim

SEEDS_OF_A_CAPTION = 8  # where it is measured what a caption leaves open


class EvaluateConfig(ScriptConfig):
    """Settings of evaluate."""

    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    data: DataConfig = DataConfig(source="")
    """what is left out is as in the training of the model"""
    out: Path | None = None
    """folder for the report; the one that the model folder is in when left out"""
    num_samples: int = Field(240, ge=2)
    """held-out images, and images that are generated from their captions"""
    extractor: str | None = None
    """the network whose features are compared: `local-dir:FOLDER` of train_clip or open_clip, `hf-hub:ORG/NAME`, an
    open_clip NAME:TAG, or `inception:FILE`; the CLIP of the model's own text tower when left out"""
    reference: Literal["test", "train"] = "test"
    """the real images: the held-out ones, or where these are few, training images"""
    features: Path | None = None
    """file of the reference's features: read where it is there, written where not"""
    max_train_images: int = Field(10_000, ge=0)
    """training images that are searched for copies, evenly spaced; 0: none"""
    steps: int = Field(30, ge=1)
    guidance_scale: float | None = None
    """the scale of the model's own sample images when left out, 7.5 where it has none"""
    sampler: str = "dpmpp_2m"
    batch_size: int = Field(60, ge=1)
    seed: int = 0
    device: str | None = None
    """cpu, cuda or mps; the best available one when left out"""
    sweep: bool = False
    """measure each combination of the following instead, into sweep.json and a heat map, sweep.png"""
    sweep_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5)
    sweep_steps: tuple[int, ...] = (10, 20, 30)
    sweep_samplers: tuple[str, ...] = ("dpmpp_2m", "euler")
    compare: tuple[Path, Path] | None = None
    """compare two evaluation.json, and measure nothing"""

    def values_below(self) -> dict[str, Any]:
        """The newest model, and the data that the model was trained on, or its resolution."""
        if self.compare:
            return {}
        path = self.model or latest_model("pipeline", Path("runs"), script="make demo")
        is_ours = model_kind(path) is not None
        model = read_manifest(path, "pipeline", PipelineManifest.from_dict) if is_ours else load_components(path)
        return {"model": path, "data": model.metadata.get("data", {"source": "", "resolution": model.resolution})}


@dataclass
class Subject:
    """A model, the held-out images that it is measured on, with their captions, and what compares images."""

    pipeline: Pipeline
    folder: Path
    held_out: ImageTextDataset
    images: Tensor  # (n, c, h, w) in [-1, 1]
    captions: list[str]
    extractor: Extractor | None
    drawn: DrawnSet | None  # where the captions' truth is known

    @cached_property
    def classifier(self) -> AttributeClassifier:
        """What reads images of the drawn set."""
        assert self.drawn is not None
        return load_classifier(self.folder.parent.parent, self.drawn, self.pipeline.resolution)


def evaluate(config: EvaluateConfig) -> None:
    """Measure, print a table and write the report; or sweep, or compare two reports."""
    if config.compare:
        print(compare(*config.compare))
        return
    for sampler in (config.sampler, *config.sweep_samplers):
        get_sampler(sampler, None)
    folder, data = config.model, config.data
    if folder is None or not data.source:
        raise ValueError(f"{folder} does not name its data, as it was not trained here: pass --data.source")
    out = folder.parent if config.out is None else config.out
    check_folder(out, "--out")
    subject = open_subject(folder, config)
    if config.sweep:
        sweep(subject, config, out)
        return
    report = measure(subject, config, out)
    report.write(out)
    print(report.table())


def open_subject(folder: Path, config: EvaluateConfig) -> Subject:
    """Read the model, the extractor and the held-out images."""
    pipeline = Pipeline.load(folder, device=config.device)
    if pipeline.vae is not None:
        config.data.check_channels(pipeline.vae.config.image_channels)
    own = own_extractor(pipeline)
    name = config.extractor or own
    extractor = open_extractor(name, pipeline.device, own) if name else None
    held_out = open_centered(config.data, "test", config.seed)
    print(f"at {config.data.resolution} pixels: {held_out.describe()}")
    batches = list(sample_batches(held_out, held_out.source.evenly_spaced(config.num_samples)))
    captions = [caption for batch in batches for caption in batch["caption"]]
    images = torch.cat([batch["image"] for batch in batches])
    drawn = drawn_set(config.data) if pipeline.text else None
    return Subject(pipeline, folder, held_out, images, captions, extractor, drawn)


def open_centered(data: DataConfig, split: Split, seed: int) -> ImageTextDataset:
    """A split, also the training split, as squares about the centre, each with its first caption."""
    dataset = open_dataset(data.model_copy(update={"bucket_step": 0}), split, seed=seed)
    dataset.training = False
    return dataset


# Measuring.


def measure(subject: Subject, config: EvaluateConfig, out: Path) -> Report:
    """All measures that the model, the data and the extractor allow; figures go into the folder `out`."""
    pipeline, extractor = subject.pipeline, subject.extractor
    report = start_report(subject, config)
    reference = None if extractor is None else reference_features(subject, extractor, config)
    if pipeline.vae is not None:  # what the U-Net cannot beat
        reconstructions = reconstruct(subject, config)
        report.measures |= vae_fidelity(subject.images, reconstructions)
        if extractor and reference is not None:
            features = extract(extractor, reconstructions)
            paired = config.reference == "test"
            report.measures |= compare_features(reference, features, name=f"r{{}}_{extractor.suffix}", paired=paired)
    if pipeline.unet.config.cond_channels:
        report.notes.append("an inpainting model generates from images: only its VAE is measured")
        return checked(report)
    generated = generate(subject, subject.captions, config)
    if subject.drawn:
        report.measures |= what_is_shown(subject, generated, config)
    if extractor and reference is not None:
        report.measures |= image_quality(subject, extractor, reference, generated, config)
        report.measures |= other_real_images(subject, extractor, reference, config)
        report.notes += missing_metrics(reference, generated).values()
    nearest = search_training(subject, generated, config, out, report) if config.max_train_images else {}
    save_image(captioned_grid(tensor_to_pil(generated[:24]), subject.captions[:24], columns=8), out / "samples.png")
    plot(report.measures, nearest, out / "evaluation.png")
    report.figures += ["evaluation.png", "samples.png"]
    return checked(report)


def start_report(subject: Subject, config: EvaluateConfig) -> Report:
    """A report without measures, which says what they will depend on."""
    pipeline, extractor = subject.pipeline, subject.extractor
    scale = pipeline.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
    report = Report(
        model={"model": str(subject.folder), "unet_sha256": weights_sha256(pipeline.unet)[:16]},
        protocol={
            "data_sha256": data_sha256(subject.held_out),
            "resolution": config.data.resolution,
            "channels": config.data.channels,
            "num_samples": len(subject.images),
            "reference": config.reference,
            **(extractor.identity() if extractor else {}),
        },
        settings={
            "data": config.data.source,
            **({"extractor_name": extractor.name} if extractor else {}),
            "guidance_scale": scale,
            "steps": config.steps,
            "sampler": config.sampler,
            "seed": config.seed,
        },
    )
    if extractor is None:
        report.notes.append(f"features are not compared: the model has no image tower; pass --extractor: {CHOICES}")
    return report


def checked(report: Report) -> Report:
    """ValueError where nothing was measured; notes are printed."""
    if not report.measures and not report.memorization:
        raise ValueError(f"{report.model['model']}: nothing can be measured: {'; '.join(report.notes)}")
    for note in report.notes:
        print(note)
    return report


def data_sha256(held_out: ImageTextDataset) -> str:
    """A hash of the held-out images, wherever they are stored."""
    return short_hash(f"{held_out.config.drawn} {held_out.fingerprint()}")


def reconstruct(subject: Subject, config: EvaluateConfig) -> Tensor:
    """The held-out images (n, c, h, w) through the VAE."""
    pipeline = subject.pipeline
    batches = tqdm(subject.images.split(config.batch_size), "reconstructing", unit="batch")
    return torch.cat([to_8_bits(pipeline.decode(pipeline.encode(batch))) for batch in batches])


def vae_fidelity(images: Tensor, reconstructions: Tensor) -> dict[str, Estimate]:
    """PSNR (dB) and SSIM of reconstructed held-out images (n, c, h, w)."""
    scores = {"VAE PSNR, dB": psnr(reconstructions, images), "VAE SSIM": ssim(reconstructions, images)}
    return {name: mean_ci(values.tolist()) for name, values in scores.items()}


def generate(subject: Subject, captions: Sequence[str], config: EvaluateConfig) -> Tensor:
    """Images (n, c, h, w) in [-1, 1] of captions: image i has seed + i."""
    images = []
    for first in tqdm(range(0, len(captions), config.batch_size), "generating", unit="batch"):
        batch = list(captions[first : first + config.batch_size])
        seeds = range(config.seed + first, config.seed + first + len(batch))
        settings: dict[str, Any] = {"steps": config.steps, "sampler": config.sampler}
        settings |= {"guidance_scale": config.guidance_scale, "literal": True}
        images.append(to_8_bits(subject.pipeline.sample(batch, seeds, **settings)))
    return torch.cat(images)


def reference_features(subject: Subject, extractor: Extractor, config: EvaluateConfig) -> Tensor:
    """Features (m, d) of the real images: computed, or those in the file `--features`."""
    images: Iterator[Tensor] = iter(subject.images.split(64))
    about = {"reference": config.reference, "images": data_sha256(subject.held_out), "count": f"{len(subject.images)}"}
    if config.reference == "train":
        training = open_centered(config.data, "train", config.seed)
        indices = training.source.evenly_spaced(config.max_train_images or config.num_samples)
        about |= {"images": data_sha256(training), "count": str(len(indices))}
        images = (batch["image"] for batch in sample_batches(training, indices))
    if config.features is not None and config.features.exists():
        return read_features(config.features, extractor, about)
    features = torch.cat([extractor(batch) for batch in tqdm(images, "features of real images", unit="batch")])
    if config.features is not None:
        write_features(config.features, features, extractor, about)
    return features


def extract(extractor: Extractor, images: Tensor) -> Tensor:
    """Features (n, d) of images (n, c, h, w)."""
    return torch.cat([extractor(batch) for batch in images.split(64)])


def image_quality(
    subject: Subject, extractor: Extractor, reference: Tensor, generated: Tensor, config: EvaluateConfig
) -> dict[str, Estimate]:
    """What compares features of generated images with those of the reference (m, d), and with captions."""
    features, paired = extract(extractor, generated), config.reference == "test"
    found = compare_features(reference, features, name=f"{{}}_{extractor.suffix}", paired=paired)
    if extractor.encode_text and any(subject.captions):
        found |= {f"clip_score_{extractor.suffix}": clip_score(extractor, features, subject.captions)}
        real = extract(extractor, subject.images)
        found |= {f"clip_score_{extractor.suffix}, real images": clip_score(extractor, real, subject.captions)}
    return found


def other_real_images(
    subject: Subject, extractor: Extractor, reference: Tensor, config: EvaluateConfig
) -> dict[str, Estimate]:
    """What real images that are not in the reference get, which is what a perfect model would."""
    images = subject.images
    if config.reference == "test":
        training = open_centered(config.data, "train", config.seed)
        indices = training.source.evenly_spaced(len(images))
        images = torch.cat([batch["image"] for batch in sample_batches(training, indices)])
    return compare_features(reference, extract(extractor, images), name=f"{{}}_{extractor.suffix}, real images")


def clip_score(extractor: Extractor, features: Tensor, captions: Sequence[str]) -> Estimate:
    """100 x the cosine of the features of images (n, d) and of their captions, where positive (Hessel et al. 2021)."""
    rows = [captions[first : first + 64] for first in range(0, len(captions), 64)]
    text = torch.cat([extractor.text(list(batch)) for batch in rows])
    return mean_ci((100 * F.cosine_similarity(features, text)).clamp_min(0).tolist())


# Whether prompts are followed, on sets that are drawn here.


def what_is_shown(subject: Subject, generated: Tensor, config: EvaluateConfig) -> dict[str, Estimate]:
    """Whether images of the held-out captions show what these ask for, vary as in training, on flat backgrounds."""
    drawn = subject.drawn
    assert drawn is not None
    classifier, scenes = subject.classifier, drawn.by_caption("test")
    chosen = [scenes[caption] for caption in subject.captions]
    found = asked_for(subject, generated)
    found |= {"background deviation, 8-bit steps": background_deviation(drawn, generated, chosen)}
    if captions := drawn.open_captions():
        count = max(config.num_samples // SEEDS_OF_A_CAPTION, 1)
        spread = [captions[i * len(captions) // count] for i in range(count) for _ in range(SEEDS_OF_A_CAPTION)]
        named = drawn.asked(scenes[captions[0]], captions[0])
        left_open = [name for name in drawn.attributes if name not in named]
        found |= variety(drawn, classifier, generate(subject, spread, config), left_open)
    return found


def asked_for(subject: Subject, generated: Tensor) -> dict[str, Estimate]:
    """The prompt accuracy of images of the held-out captions."""
    drawn = subject.drawn
    assert drawn is not None
    scenes = drawn.by_caption("test")
    asked = [drawn.asked(scenes[caption], caption) for caption in subject.captions]
    return prompt_accuracy(subject.classifier, generated, asked)


# Memorization.


def search_training(
    subject: Subject, generated: Tensor, config: EvaluateConfig, out: Path, report: Report
) -> dict[str, dict[str, Nearest]]:
    """The nearest training image of each sample and each held-out image, in each space; the report gets the rest."""
    training = open_centered(config.data, "train", config.seed)
    indices = training.source.evenly_spaced(config.max_train_images)
    signatures: list[NDArray[np.int16]] = []

    def batches() -> Iterator[Tensor]:
        for batch in tqdm(sample_batches(training, indices), "training images", -(-len(indices) // 64), unit="batch"):
            signatures.extend(map(signature, tensor_to_pil(batch["image"])))
            yield batch["image"]

    sets = {"samples": generated, "held-out images": subject.images}
    nearest = find_nearest(sets, batches(), spaces(subject))
    for space, found in nearest.items():
        distances = (found[name].distances for name in sets)
        report.memorization[space] = compare_distances(*distances)
    groups = [[training.source.names[indices[i]] for i in group] for group in find_duplicates(signatures)]
    report.training = {
        "images": len(training),
        "searched": len(indices),
        "look_like_another": sum(len(group) - 1 for group in groups),
        "examples": groups[:5],
    }

    def read(positions: Sequence[int]) -> Tensor:
        return next(sample_batches(training, [indices[i] for i in positions]))["image"]

    closest = nearest[list(nearest)[-1]]  # in features, where there are any
    pairs = closest_pairs(generated, closest["samples"], closest["held-out images"].distances, read)
    save_image(pairs, out / "pairs.png")
    report.figures.append("pairs.png")
    return nearest


def spaces(subject: Subject) -> dict[str, Callable[[Tensor], Tensor]]:
    """Where images are near each other: in pixels, and in the latents and features that there are."""
    pipeline, extractor = subject.pipeline, subject.extractor
    found: dict[str, Callable[[Tensor], Tensor]] = {"pixels": lambda images: images.flatten(1)}
    if pipeline.vae is not None:
        found["latents"] = lambda images: torch.cat(
            [pipeline.encode(batch).flatten(1).float().cpu() for batch in images.split(64)]
        )
    if extractor is not None:
        found["features"] = lambda images: F.normalize(extract(extractor, images), dim=1)
    return found


# Sweeping.


def sweep(subject: Subject, config: EvaluateConfig, out: Path) -> None:
    """Measure every combination of guidance scale, steps and sampler, and draw it."""
    name, value = sweep_measure(subject, config)
    points = []
    combinations = list(product(config.sweep_samplers, config.sweep_steps, config.sweep_scales))
    for sampler, steps, scale in tqdm(combinations, "sweep", unit="combination"):
        settings = {"sampler": sampler, "steps": steps, "guidance_scale": scale}
        points.append(SweepPoint(sampler, steps, scale, value(config.model_copy(update=settings))))
    write_sweep(name, points, out)
    print(f"{name}: {out / 'sweep.png'}, {out / 'sweep.json'}")


def sweep_measure(subject: Subject, config: EvaluateConfig) -> tuple[str, Callable[[EvaluateConfig], Estimate]]:
    """What a sweep measures: prompt accuracy where there is a classifier, else the CLIP score, else the FD."""
    captions = subject.captions
    if subject.drawn:
        name = "prompt accuracy, all"
        return name, lambda chosen: asked_for(subject, generate(subject, captions, chosen))[name]
    extractor = subject.extractor
    if extractor is None:
        raise ValueError(f"--sweep needs --extractor, as the model has no image tower: {CHOICES}")
    if extractor.encode_text and any(subject.captions):
        return f"clip_score_{extractor.suffix}", lambda chosen: clip_score(
            extractor, extract(extractor, generate(subject, captions, chosen)), subject.captions
        )
    reference, name = reference_features(subject, extractor, config), f"fd_{extractor.suffix}"
    if missing := missing_metrics(reference, subject.images).get(FD):
        raise ValueError(f"--sweep: {missing}: raise --num-samples or add held-out images")
    return name, lambda chosen: compare_features(
        reference, extract(extractor, generate(subject, captions, chosen)), name=f"{{}}_{extractor.suffix}"
    )[name]
