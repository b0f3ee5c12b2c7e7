"""What is trained: each stage is one file with its configuration, data, loss, validation, samples and model folder."""

from typing import Any

from ldm.cli import config_flag
from ldm.stages.clip import CLIPStage
from ldm.stages.diffusion import DiffusionStage
from ldm.stages.vae import VAEStage

STAGES: dict[str, Any] = {"clip": CLIPStage, "vae": VAEStage, "ldm": DiffusionStage}


def split_stage(args: list[str]) -> tuple[Any, list[str]]:
    """The stage that a command line names in its first word or by its configuration file, else ldm; and its flags."""
    if args and args[0] in STAGES:
        return STAGES[args[0]], args[1:]
    file = config_flag(args)
    return STAGES.get(file.stem if file else "ldm", DiffusionStage), args


__all__ = ["STAGES", "CLIPStage", "DiffusionStage", "VAEStage", "split_stage"]
