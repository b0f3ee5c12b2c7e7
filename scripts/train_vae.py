"""Train the VAE that compresses images to latents, and measure the statistics of those latents."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import folders, pictures
from ldm.config import errors_for_people, parse
from ldm.data import DataConfig, collate, open_dataset
from ldm.data.order import first_samples, image_batches
from ldm.keyed import Draws
from ldm.pipeline import to_images
from ldm.training.loop import Batch, Fit, Hooks, Player, Stage, TrainingConfig, fit, gather_of, make_accelerator
from ldm.vae import VAE, VAEConfig
from ldm.vae.losses import VAELossConfig, psnr, ssim, vae_loss
from ldm.vae.statistics import measure_latents
from ldm.weights import save_weights

DEFAULT = Path(__file__).parents[1] / "configs/shapes/vae.yaml"


class TrainVAE(TrainingConfig):
    """Settings of train_vae."""

    run: Path = Path("runs/shapes/vae")
    data: DataConfig = DataConfig()
    vae: VAEConfig = VAEConfig()
    loss: VAELossConfig = VAELossConfig()


def train(config: TrainVAE, fit: Fit = fit) -> Path:
    """Build the stage and run it, with `fit` or with what looks at it in its place; returns the model folder."""
    config.vae.latent_size(config.data.size)
    config.data.check_buckets(config.vae.factor)
    config.data.check_channels(config.vae.image_channels)
    accelerator = make_accelerator(config)
    data, held_out = (open_dataset(config.data, split, seed=config.seed) for split in ("train", "test"))
    accelerator.print(data.describe())
    vae = VAE(config.vae, gradient_checkpointing=config.gradient_checkpointing)
    if vae.linear is not None:  # a resumed run overwrites this with what it had learned
        vae.linear.fit(torch.cat(list(image_batches(data.squares(), data.spread(2048)))))
    fixed = collate(first_samples(held_out, 64))["image"]

    def loss(module: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        noise = draws.normal("latent", config.vae.latent_shape(batch["image"]))
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
        return pictures.grid(to_images(pairs), columns=8)

    def save_model(folder: Path) -> None:
        batches = image_batches(data.squares(), data.spread(4096))
        measure_latents(vae, (images.to(accelerator.device) for images in batches))
        digest = save_weights(vae, folder / "vae.safetensors")
        values = {"data": config.data.to_dict(), "vae": config.vae.to_dict(), "vae_sha256": digest}
        folders.write_model(folder, "vae", values)

    stage = Stage(
        players=[Player("vae", vae, loss)],
        data=data,
        collate=collate,
        hooks=Hooks(
            validate=validate,
            sample=sample,
            save_model=save_model,
            check=lambda: data.share_unreadable(gather_of(accelerator)),
        ),
        identity={"data": data.identity(), "vae": config.vae.to_dict()},
        order=data.order,
    )
    try:
        return fit(config, accelerator, stage)
    finally:
        accelerator.print(f"{data.report()}\n{held_out.report()}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse(TrainVAE, argv, default=DEFAULT, description=__doc__)
    with errors_for_people():
        train(config)


if __name__ == "__main__":
    main()
