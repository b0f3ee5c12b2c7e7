"""Train the U-Net on noised latents (or pixels) under frozen text embeddings."""

from ldm.cli import command
from ldm.stages.diffusion import DiffusionStage, TrainLDMConfig
from ldm.training.trainer import train


def run(config: TrainLDMConfig) -> int:
    """Exit status: 0, or 128 + the signal that stopped the run."""
    return train(DiffusionStage, config).exit_status


main = command(TrainLDMConfig, run, __doc__, default=DiffusionStage.default)

if __name__ == "__main__":
    main()
