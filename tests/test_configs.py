"""Every configuration file is read, its models build on the meta device, and its text fits its network."""

from pathlib import Path

import open_clip
import pytest
import torch

from ldm.config import CONFIGS, read_yaml
from ldm.evaluation.figures import FiguresConfig
from ldm.stages import STAGES
from ldm.stages.clip import TrainCLIPConfig
from ldm.stages.diffusion import TrainLDMConfig
from ldm.stages.vae import TrainVAEConfig
from ldm.unet import UNet
from ldm.vae import VAE

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_configuration_file_is_read_and_its_models_build(path: Path) -> None:
    if path.stem == "figures":
        assert FiguresConfig.from_dict(read_yaml(path), source=path.name).captions
        return
    stage = path.stem if path.stem in STAGES else "ldm"
    config = STAGES[stage].Config.from_dict(read_yaml(path), source=path.name)
    with torch.device("meta"):
        if isinstance(config, TrainVAEConfig):
            VAE(config.vae)
            config.vae.latent_size(config.data.resolution)
        elif isinstance(config, TrainCLIPConfig):
            open_clip.CLIP(**config.clip.architecture(config.data.resolution))
        else:
            UNet(config.unet)


def test_the_text_width_of_public_towers_fits_their_networks() -> None:
    for folder in ("sd15", "sd21-base", "sd21-v", "sdxl", "images-256"):
        config = TrainLDMConfig.from_dict(read_yaml(CONFIGS / f"{folder}/ldm.yaml"), source=folder)
        towers = [tower for tower in (config.text, config.second_text) if tower.model != "none"]
        widths = [open_clip.get_model_config(tower.model)["text_cfg"]["width"] for tower in towers]
        assert sum(widths) == config.unet.context_dim
        for tower in towers:
            assert tower.pretrained in open_clip.list_pretrained_tags_by_model(tower.model)


def test_no_file_names_a_machine_or_a_registry() -> None:
    for file in ROOT.glob("requirements*.lock"):
        for line in file.read_text().splitlines():
            assert line.count("==") == 1 and "/" not in line and " " not in line, line
