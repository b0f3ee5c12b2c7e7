"""Train a small OpenCLIP from nothing on the images and captions of a data set."""

from ldm.cli import command
from ldm.stages.clip import CLIPStage, TrainCLIPConfig
from ldm.training.trainer import train


def run(config: TrainCLIPConfig) -> int:
    """Exit status: 0, or 128 + the signal that stopped the run."""
    return train(CLIPStage, config).exit_status


main = command(TrainCLIPConfig, run, __doc__, default=CLIPStage.default)

if __name__ == "__main__":
    main()
