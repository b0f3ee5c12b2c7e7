"""The VAE: an encoder compresses images to latents, a decoder gives them back (Rombach et al. 2022, section 3.1)."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ldm.config import CONFIGS, check_equal
from ldm.data import Batch, DataConfig, ImageTextDataset, open_splits
from ldm.data.loader import sample_batches
from ldm.imaging import image_grid, tensor_to_pil
from ldm.io.model_dir import write_manifest
from ldm.io.tensors import init_weights, save_weights
from ldm.pipeline.load import load_vae
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
        """With data and initial weights; ValueError as `open_dataset` and the networks raise it."""
        stage = cls(config)
        stage.data, stage.held_out = open_splits(config.data, seed=config.seed)
        announce(stage, accelerator)
        if config.init_from and not config.resume:
            source = load_vae(config.init_from)
            check_equal(config.vae, source.config, config.init_from)
            init_weights(stage.vae, source.state_dict(), config.init_from)
        elif stage.vae.linear is not None and not config.resume:
            stage.vae.linear.init_from_pca(torch.cat(list(stage.data.spread_images(2048))))
        stage.device, stage.validation = accelerator.device, next(sample_batches(stage.held_out))["image"]
        return stage

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
        digest = save_weights(self.vae, folder / "vae.safetensors")
        values = {"data": self.config.data.to_dict(), "vae": self.config.vae.to_dict(), "vae_sha256": digest}
        write_manifest(folder, "vae", values)

    def fingerprint(self) -> dict[str, Any]:
        return {"data": self.data.fingerprint(), "vae": self.config.vae.to_dict()}
