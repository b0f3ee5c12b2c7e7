"""Distill the VAE's decoder into a tiny one for previews, and put that beside the model."""

from ldm.cli import command
from ldm.stages.preview import DistillConfig, PreviewStage
from ldm.training.trainer import train


def run(config: DistillConfig) -> int:
    """Exit status: 0, or 128 + the signal that stopped the run."""
    return train(PreviewStage, config).exit_status


main = command(DistillConfig, run, __doc__)

if __name__ == "__main__":
    main()
