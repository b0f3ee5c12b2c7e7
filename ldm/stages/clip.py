"""CLIP: an image tower and a text tower learn which caption belongs to which image (Radford et al. 2021)."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.commands import command_to_train
from ldm.config import CONFIGS
from ldm.data import Batch, DataConfig, ImageTextDataset, open_splits
from ldm.data.loader import sample_batches
from ldm.io.model_dir import write_manifest
from ldm.io.tensors import to_device
from ldm.ranks import ONE_RANK, Ranks
from ldm.rng import StepRNG
from ldm.stages.start import announce, equal_captions
from ldm.text.clip import CLIP, CLIPConfig, retrieval_accuracy
from ldm.training.config import TrainingConfig
from ldm.training.stage import Networks, Stage, Trainable


class TrainCLIPConfig(TrainingConfig):
    """Settings of train_clip."""

    run: Path = Path("runs/characters/clip")
    data: DataConfig = DataConfig()
    clip: CLIPConfig = CLIPConfig()


class CLIPStage(Stage):
    """Trains open_clip's own model on the images and captions of a data set."""

    Config, default = TrainCLIPConfig, CONFIGS / "characters/clip.yaml"
    data: ImageTextDataset
    held_out: ImageTextDataset
    device: torch.device
    validation: Batch  # held-out images and captions

    def __init__(self, config: TrainCLIPConfig, *, rank: int = 0, world: int = 1) -> None:
        if config.grad_accum_steps > 1:
            raise ValueError("grad_accum_steps: the contrastive loss compares all images of a batch; leave it at 1")
        if config.data.bucket_step:
            raise ValueError("data.bucket_step: the image tower needs squares; leave it at 0 for train_clip")
        from open_clip.loss import ClipLoss  # slow to import

        self.config = config
        self.clip = CLIP(config.clip.architecture(config.data.resolution))
        self.contrastive_loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world)
        self.trainables, self.frozen = [Trainable("clip", self.clip)], {}

    @classmethod
    def build(cls, config: TrainCLIPConfig, accelerator: Accelerator) -> "CLIPStage":
        """With networks; ValueError as they raise it."""
        stage = cls(config, rank=accelerator.process_index, world=accelerator.num_processes)
        stage.device = accelerator.device
        return stage

    def open_data(self, accelerator: Accelerator) -> None:
        self.data, self.held_out = open_splits(self.config.data, seed=self.config.seed)
        cut = self.clip.tokenizer.read_ahead(self.data.captions, self.held_out.captions)
        announce(self, accelerator, cut, *equal_captions(self.data, self.clip.tokenizer, self.config.batch_size))
        self.validation = next(sample_batches(self.held_out, batch_size=128))

    def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        """Symmetric cross-entropy between images and captions of the whole batch of all ranks."""
        images = batch["image"].to(rng.device, non_blocking=True)
        ids = to_device(self.clip.tokenizer(batch["caption"]), rng.device)
        features = networks["clip"](images, ids)
        with torch.autocast(rng.device.type, enabled=False):  # logits of up to 100, whose differences count
            return {"loss": self.contrastive_loss(**features)}

    def chance_loss(self, name: str, batch: Batch, rng: StepRNG) -> float:
        """All captions of the batch are equally likely."""
        return math.log(rng.batch_size)

    def report(self) -> str:
        return self.clip.tokenizer.report()

    def example_batch(self, count: int) -> Batch:
        return self.config.data.example_batch(count)

    def validate(self, ranks: Ranks = ONE_RANK) -> dict[str, float]:
        """Share of held-out captions whose own image is the nearest of all, so each rank compares all."""
        images = self.validation["image"].to(self.device)
        return {"validation_retrieval": retrieval_accuracy(self.clip, images, self.validation["caption"])}

    def sample(self) -> None:
        """There is nothing to look at."""

    def save(self, folder: Path) -> None:
        """Write a folder that open_clip loads as `local-dir:FOLDER`."""
        self.clip.save(folder)
        write_manifest(folder, "text tower", {"data": self.config.data.source})

    def next_command(self) -> str:
        return command_to_train(self.config, "vae", self.default)

    def fingerprint(self) -> dict[str, Any]:
        return {"data": self.config.data.fingerprint(), "clip": self.config.clip.to_dict()}
