"""What is evaluated: a model, the held-out images, their reconstructions, and what is generated in their place."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from ldm.cli import ScriptConfig
from ldm.data import DataConfig, ImageTextDataset, open_dataset
from ldm.data.loader import sample_batches
from ldm.data.sources.base import Split, short_hash
from ldm.evaluation.classifier import AttributeClassifier, load_classifier
from ldm.evaluation.drawn import DrawnSet, drawn_set
from ldm.evaluation.features import Extractor, open_extractor, own_extractor
from ldm.imaging import to_8_bits
from ldm.io.model_dir import latest_model, model_kind, read_manifest
from ldm.pipeline import Pipeline
from ldm.pipeline.load import PipelineManifest, load_components
from ldm.precision import Precision


class EvaluateConfig(ScriptConfig):
    """Settings of evaluate."""

    model: Path | None = None
    """model folder; the newest finished one below runs/ when left out"""
    data: DataConfig = DataConfig(source="")
    """what is left out is as in the training of the model"""
    out: Path | None = None
    """folder for the report, and for the classifier of a drawn set; when left out, the one that the model folder is in,
    and for the classifier the one above it, where other runs find it"""
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
    steps: int | None = Field(None, ge=1)
    """the sampling steps of the model's own sample images when left out, 30 where it has none"""
    guidance_scale: float | None = None
    """the scale of the model's own sample images when left out, 7.5 where it has none"""
    sampler: str = "dpmpp_2m"
    batch_size: int = Field(60, ge=1)
    seed: int = 0
    device: str | None = None
    """cpu, cuda or mps; the best available one when left out"""
    precision: Precision | None = None
    """what the model's networks compute in; when left out bf16 on GPUs that have it, else float32"""
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
    classifiers: Path  # folder of the classifier of the drawn set

    @cached_property
    def training(self) -> ImageTextDataset:
        """The training split, as the held-out images are read."""
        return open_centered(self.held_out.config, "train", self.held_out.seed)

    @cached_property
    def classifier(self) -> AttributeClassifier:
        """What reads images of the drawn set."""
        assert self.drawn is not None
        return load_classifier(self.classifiers, self.drawn, self.pipeline.resolution)


def open_subject(folder: Path, config: EvaluateConfig) -> Subject:
    """Read the model, the extractor and the held-out images."""
    pipeline = Pipeline.load(folder, device=config.device, precision=config.precision)
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
    if len(images) < 2:
        raise ValueError("an evaluation needs at least 2 held-out images, for its intervals; there is 1: add images")
    drawn = drawn_set(config.data) if pipeline.text else None
    classifiers = config.out or folder.parent.parent
    return Subject(pipeline, folder, held_out, images, captions, extractor, drawn, classifiers)


def open_centered(data: DataConfig, split: Split, seed: int) -> ImageTextDataset:
    """A split, also the training split, as squares about the centre, each with its first caption."""
    dataset = open_dataset(data.model_copy(update={"bucket_step": 0}), split, seed=seed)
    dataset.training = False
    return dataset


def data_sha256(images: ImageTextDataset) -> str:
    """A hash of the images of a split, as they are read, wherever they are stored."""
    config = images.config
    read_as = config.drawn, config.emoji_font and config.emoji_font.name, config.resolution, config.channels
    return short_hash(f"{read_as} {images.fingerprint()}")


def reconstruct(subject: Subject, config: EvaluateConfig) -> Tensor:
    """The held-out images (n, c, h, w) through the VAE."""
    pipeline = subject.pipeline
    batches = tqdm(subject.images.split(config.batch_size), "reconstructing", unit="batch")
    return torch.cat([to_8_bits(pipeline.decode(pipeline.encode(batch))) for batch in batches])


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
