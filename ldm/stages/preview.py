"""A tiny decoder for previews: it learns to decode latents as the VAE of a finished model does (distillation)."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ldm.data import Batch, DataConfig, ImageTextDataset, open_splits
from ldm.data.loader import sample_batches
from ldm.imaging import image_grid, tensor_to_pil
from ldm.io.model_dir import latest_model, read_json
from ldm.io.tensors import weights_sha256
from ldm.parts import VAE_PIXELS, images_at_once
from ldm.pipeline.load import load_vae, save_preview_decoder
from ldm.precision import place
from ldm.ranks import ONE_RANK, Ranks
from ldm.rng import StepRNG
from ldm.training.config import TrainingConfig
from ldm.training.stage import Networks, Stage, Trainable
from ldm.vae.losses import psnr
from ldm.vae.tiny import TinyDecoder


class DistillConfig(TrainingConfig):
    """Settings of distill_decoder."""

    run: Path = Path("runs/preview")
    model: Path | None = None
    """model folder, of a whole model or of a VAE, which gets the decoder; the newest whole one below runs/ when left
    out"""
    data: DataConfig = DataConfig(source="")
    """what is left out is as in the training of the model"""
    steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 2e-3
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    ema_decay: float = 0.99

    def values_below(self) -> dict[str, Any]:
        """The newest model, and the data that the model was trained on."""
        path = self.model or latest_model("pipeline", Path("runs"), script="make demo")
        manifest = read_json(path / "model.json")
        data = manifest.get("data") or manifest.get("metadata", {}).get("data")
        return {"model": path, "data": data if isinstance(data, dict) else {}}  # another kind of model is refused later


class PreviewStage(Stage):
    """Trains a tiny decoder under a frozen VAE."""

    data: ImageTextDataset
    held_out: ImageTextDataset
    validation: Tensor  # held-out images (b, c, h, w)

    def __init__(self, config: DistillConfig, device: torch.device) -> None:
        assert config.model is not None  # `values_below` finds one
        self.config, self.device, self.vae = config, device, load_vae(config.model)
        if not config.data.source:
            raise ValueError(f"{config.model} does not name its data, as it was not trained here: pass --data.source")
        self.decoder = TinyDecoder(self.vae.config)
        self.trainables, self.frozen = [Trainable("decoder", self.decoder)], {"vae": place(self.vae, device)}
        self.vae_sha256 = weights_sha256(self.vae)

    @classmethod
    def build(cls, config: DistillConfig, accelerator: Accelerator) -> "PreviewStage":
        """With the VAE of the model; ValueError where it has none."""
        return cls(config, accelerator.device)

    def open_data(self, accelerator: Accelerator) -> None:
        self.data, self.held_out = open_splits(self.config.data, seed=self.config.seed)
        accelerator.print(self.data.describe())
        self.validation = next(sample_batches(self.held_out))["image"]

    @torch.no_grad()
    def _pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Standardized latents of images, and what the VAE decodes from them."""
        latents = self.vae.encode(images.to(self.device, non_blocking=True)).mean
        return self.vae.standardize(latents), self.vae.decode(latents).clamp(-1, 1)

    def loss(self, name: str, networks: Networks, batch: Batch, rng: StepRNG) -> dict[str, Tensor]:
        """Mean absolute difference of the images that both decoders make of the same latents."""
        latents, decoded = self._pair(batch["image"])
        return {"loss": F.l1_loss(networks["decoder"](latents), decoded)}

    def example_batch(self, count: int) -> Batch:
        return self.config.data.example_batch(count)

    def validate(self, ranks: Ranks = ONE_RANK) -> dict[str, float]:
        """PSNR against what the VAE decodes, in dB."""

        def psnr_of(images: Tensor) -> float:
            latents, decoded = self._pair(images)
            return psnr(self.decoder(latents).clamp(-1, 1), decoded).sum().item()

        count = len(self.validation)
        size = ranks.part_size(count, images_at_once(self.validation.shape[-2:], VAE_PIXELS))
        total = sum(ranks.map(psnr_of, self.validation.split(size)))
        return {"validation_psnr": total / count}

    def sample(self) -> Image.Image:
        """What the VAE decodes of held-out latents, each next to the tiny decoder's."""
        latents, decoded = self._pair(self.validation[:32])
        pairs = torch.stack([decoded, self.decoder(latents).clamp(-1, 1)], 1).flatten(0, 1)
        return image_grid(tensor_to_pil(pairs), columns=8)

    def save(self, folder: Path) -> None:
        """Write the decoder, also beside the model that it imitates."""
        for target in (folder, self.config.model):
            assert target is not None
            save_preview_decoder(self.decoder, target, self.vae_sha256)

    def next_command(self) -> str:
        return ""

    def fingerprint(self) -> dict[str, Any]:
        return {"data": self.config.data.fingerprint(), "vae": self.vae_sha256}
