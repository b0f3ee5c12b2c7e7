"""The VAE: an encoder compresses images to latents, a decoder gives them back (Rombach et al. 2022, section 3.1)."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ldm.commands import command_to_train
from ldm.config import CONFIGS, check_equal
from ldm.data import Batch, DataConfig, ImageTextDataset, open_splits
from ldm.data.loader import sample_batches
from ldm.imaging import image_grid, tensor_to_pil
from ldm.io.tensors import init_weights
from ldm.pipeline.load import load_vae, save_vae
from ldm.rng import StepRNG
from ldm.stages.start import announce
from ldm.training.config import TrainingConfig
from ldm.training.stage import Networks, Stage, Trainable
from ldm.vae import VAE, VAEConfig
from ldm.vae.losses import VAELossConfig, psnr, ssim, vae_loss


class TrainVAEConfig(TrainingConfig):
    """Settings of train_vae."""

    run: Path = Path("runs/shapes/vae")
    data: DataConfig = DataConfig()
    vae: VAEConfig = VAEConfig()
    loss: VAELossConfig = VAELossConfig()
    init_from: Path | None = None
    """start from the VAE of a finished model: a model folder, a diffusers folder or a single file"""


class VAEStage(Stage):
    """Trains a VAE and measures the statistics of its latents."""

    Config, default = TrainVAEConfig, CONFIGS / "shapes/vae.yaml"
    data: ImageTextDataset
    held_out: ImageTextDataset
    device: torch.device
    validation: Tensor  # held-out images (b, c, h, w)

    def __init__(self, config: TrainVAEConfig) -> None:
        config.vae.latent_size(config.data.resolution)
        config.data.check_buckets(config.vae.factor)
        config.data.check_channels(config.vae.image_channels)
        self.config = config
        self.vae = VAE(config.vae, gradient_checkpointing=config.gradient_checkpointing)
        self.trainables, self.frozen = [Trainable("vae", self.vae)], {}

    @classmethod
    def build(cls, config: TrainVAEConfig, accelerator: Accelerator) -> "VAEStage":
        """With the weights of `init_from`; ValueError where these do not fit."""
        stage = cls(config)
        stage.device = accelerator.device
        if config.init_from and not config.resume:
            source = load_vae(config.init_from)
            check_equal(config.vae.to_dict(), source.config.to_dict(), config.init_from, "they must be equal")
            init_weights(stage.vae, source.state_dict(), config.init_from)
        return stage

    def open_data(self, accelerator: Accelerator) -> None:
        self.data, self.held_out = open_splits(self.config.data, seed=self.config.seed)
        announce(self, accelerator)
        if self.vae.linear is not None and not self.config.init_from and not self.config.resume:
            self.vae.linear.init_from_pca(torch.cat(list(self.data.spread_images(2048))))
        self.validation = next(sample_batches(self.held_out))["image"]

    def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        """Absolute error, SSIM and a small KL term of a reconstruction through a sampled latent."""
        images = batch["image"].to(rng.device, non_blocking=True)
        noise = rng.randn("latent", self.config.vae.latent_shape(images))
        output, posterior = networks["vae"](images, noise)
        return vae_loss(images, output, posterior, self.config.loss)

    def example_batch(self, count: int) -> Batch:
        return self.config.data.example_batch(count)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) through the mean of their posterior, in [-1, 1]."""
        return self.vae.decode(self.vae.encode(images).mean).clamp(-1, 1)

    def validate(self) -> dict[str, float]:
        """PSNR in dB and SSIM of held-out images."""
        images = self.validation.to(self.device)
        output = self.reconstruct(images)
        quality = {"psnr": psnr(output, images), "ssim": ssim(output, images)}
        return {f"validation_{name}": value.mean().item() for name, value in quality.items()}

    def sample(self) -> Image.Image:
        """Held-out images, each next to its reconstruction."""
        images = self.validation[:32].to(self.device)
        pairs = torch.stack([images, self.reconstruct(images)], 1).flatten(0, 1)
        return image_grid(tensor_to_pil(pairs), columns=8)

    def save(self, folder: Path) -> None:
        """Measure the latents, then write weights and model.json."""
        self.vae.fit_latent_stats(images.to(self.device) for images in self.data.spread_images(4096))
        save_vae(self.vae, folder, self.config.data.to_dict())

    def next_command(self) -> str:
        return command_to_train(self.config, "ldm", self.default)

    def fingerprint(self) -> dict[str, Any]:
        return {"data": self.config.data.fingerprint(), "vae": self.config.vae.to_dict()}
