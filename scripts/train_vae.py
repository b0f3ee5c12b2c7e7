"""Train the VAE that compresses images to latents, and measure the statistics of those latents."""

from ldm.cli import command
from ldm.stages.vae import TrainVAEConfig, VAEStage
from ldm.training.trainer import train


def run(config: TrainVAEConfig) -> int:
    """Exit status: 0, or 128 + the signal that stopped the run."""
    return train(VAEStage, config).exit_status


main = command(TrainVAEConfig, run, __doc__, default=VAEStage.default)

if __name__ == "__main__":
    main()
