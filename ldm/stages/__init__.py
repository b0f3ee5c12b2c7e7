"""What is trained: each stage is one file with its configuration, data, loss, validation, samples and model folder."""

from collections.abc import Callable
from typing import Any

from ldm.cli import command, config_flag
from ldm.stages.clip import CLIPStage
from ldm.stages.diffusion import DiffusionStage
from ldm.stages.vae import VAEStage
from ldm.training.trainer import FitResult, train

STAGES: dict[str, type[CLIPStage] | type[VAEStage] | type[DiffusionStage]] = {
    "clip": CLIPStage,
    "vae": VAEStage,
    "ldm": DiffusionStage,
}


def split_stage(args: list[str]) -> tuple[str, list[str]]:
    """The stage that a command line names in its first word or by its configuration file, else ldm; and its flags."""
    if args and args[0] in STAGES:
        return args[0], args[1:]
    file = config_flag(args)
    return (file.stem if file and file.stem in STAGES else "ldm"), args


def train_command(name: str, description: str | None) -> Callable[..., None]:
    """The `main` of a training script; a run that a signal stopped exits with 128 + its number."""
    stage = STAGES[name]

    def action(config: Any) -> None:
        result: FitResult = train(stage, config)
        if result.exit_status:
            raise SystemExit(result.exit_status)

    return command(stage.Config, action, description, default=stage.default)


__all__ = ["STAGES", "CLIPStage", "DiffusionStage", "VAEStage", "split_stage", "train_command"]
