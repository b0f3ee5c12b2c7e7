"""What is trained: each stage is one file with its configuration, data, loss, validation, samples and model folder."""

from ldm.stages.clip import CLIPStage
from ldm.stages.diffusion import DiffusionStage
from ldm.stages.vae import VAEStage

STAGES: dict[str, type[CLIPStage] | type[VAEStage] | type[DiffusionStage]] = {
    "clip": CLIPStage,
    "vae": VAEStage,
    "ldm": DiffusionStage,
}

__all__ = ["STAGES", "CLIPStage", "DiffusionStage", "VAEStage"]
