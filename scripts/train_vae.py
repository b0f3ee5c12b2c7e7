"""Train the VAE that compresses images to latents, and measure the statistics of those latents."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import imaging
from ldm.cli import exit_on_user_error, parse_cli
from ldm.data import DataConfig, collate, open_dataset
from ldm.data.batch_sampler import first_samples, image_batches
from ldm.io import model_dir
from ldm.io.tensors import save_weights
from ldm.pipeline.pipeline import tensor_to_pil
from ldm.rng import StepRNG
from ldm.training.config import TrainingConfig
from ldm.training.distributed import make_accelerator, make_gather
from ldm.training.stage import Batch, Fit, Stage, StageCallbacks, Trainable
from ldm.training.trainer import fit
from ldm.vae import VAE, VAEConfig
from ldm.vae.latent_stats import fit_latent_stats
from ldm.vae.losses import VAELossConfig, psnr, ssim, vae_loss

DEFAULT = Path(__file__).parents[1] / "configs/shapes/vae.yaml"


class TrainVAEConfig(TrainingConfig):
    """Settings of train_vae."""

    run: Path = Path("runs/shapes/vae")
    data: DataConfig = DataConfig()
    vae: VAEConfig = VAEConfig()
    loss: VAELossConfig = VAELossConfig()


def train(config: TrainVAEConfig, fit: Fit = fit) -> Path:
    """Build the stage and run it, with `fit` or with what looks at it in its place; returns the model folder."""
    config.vae.latent_size(config.data.resolution)
    config.data.check_buckets(config.vae.factor)
    config.data.check_channels(config.vae.image_channels)
    accelerator = make_accelerator(config)
    data, held_out = (open_dataset(config.data, split, seed=config.seed) for split in ("train", "test"))
    accelerator.print(data.describe())
    vae = VAE(config.vae, gradient_checkpointing=config.gradient_checkpointing)
    if vae.linear is not None:  # a resumed run overwrites this with what it had learned
        vae.linear.init_from_pca(torch.cat(list(image_batches(data.without_buckets(), data.evenly_spaced(2048)))))
    fixed = collate(first_samples(held_out, 64))["image"]

    def loss(module: nn.Module, batch: Batch, draws: StepRNG) -> dict[str, Tensor]:
        noise = draws.randn("latent", config.vae.latent_shape(batch["image"]))
        output, posterior = module(batch["image"], noise)
        return vae_loss(batch["image"], output, posterior, config.loss)

    def reconstruct(images: Tensor) -> Tensor:
        return vae.decode(vae.encode(images).mean).clamp(-1, 1)

    def validate() -> dict[str, float]:
        images = fixed.to(accelerator.device)
        output = reconstruct(images)
        quality = {"psnr": psnr(output, images), "ssim": ssim(output, images)}
        return {f"validation_{name}": value.mean().item() for name, value in quality.items()}

    def sample() -> Image.Image:
        images = fixed[:32].to(accelerator.device)
        pairs = torch.stack([images, reconstruct(images)], 1).flatten(0, 1)
        return imaging.image_grid(tensor_to_pil(pairs), columns=8)

    def save_model(folder: Path) -> None:
        batches = image_batches(data.without_buckets(), data.evenly_spaced(4096))
        fit_latent_stats(vae, (images.to(accelerator.device) for images in batches))
        digest = save_weights(vae, folder / "vae.safetensors")
        values = {"data": config.data.to_dict(), "vae": config.vae.to_dict(), "vae_sha256": digest}
        model_dir.write_manifest(folder, "vae", values)

    stage = Stage(
        trainables=[Trainable("vae", vae, loss)],
        data=data,
        collate=collate,
        hooks=StageCallbacks(
            validate=validate,
            sample=sample,
            save_model=save_model,
            check=lambda: data.sync_unreadable(make_gather(accelerator)),
        ),
        fingerprint={"data": data.fingerprint(), "vae": config.vae.to_dict()},
        make_batch_sampler=data.make_batch_sampler,
    )
    try:
        return fit(config, accelerator, stage)
    finally:
        accelerator.print(f"{data.report()}\n{held_out.report()}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(TrainVAEConfig, argv, default=DEFAULT, description=__doc__)
    with exit_on_user_error():
        train(config)


if __name__ == "__main__":
    main()
