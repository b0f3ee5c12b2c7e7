"""Train the VAE that compresses images to latents, and measure the statistics of those latents."""

import os

from ldm.cli import command
from ldm.evaluation.latent_card import card_line, write_latent_card
from ldm.stages.vae import TrainVAEConfig, VAEStage
from ldm.training.trainer import FitResult, train


def run(config: TrainVAEConfig) -> int:
    """Exit status: 0, or 128 + the signal that stopped the run."""
    result: FitResult = train(VAEStage, config)
    if result.model and os.environ.get("RANK", "0") == "0":
        card = write_latent_card(result.model, runs=config.run.parent)
        print(f"{result.model / 'latents.json'}: {card_line(card)}")
    return result.exit_status


main = command(TrainVAEConfig, run, __doc__, default=VAEStage.default)

if __name__ == "__main__":
    main()
