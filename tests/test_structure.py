"""The house: imports run one way, every configuration file is read, large models build on the meta device."""

import ast
from pathlib import Path

import open_clip
import pytest
import torch
import train_clip
import train_ldm
import train_vae

from ldm.cli import ScriptConfig
from ldm.config import read_yaml
from ldm.unet import UNet
from ldm.vae import VAE

ROOT = Path(__file__).parents[1]
SCRIPTS: dict[str, type[ScriptConfig]] = {
    "clip": train_clip.TrainCLIPConfig,
    "vae": train_vae.TrainVAEConfig,
    "ldm": train_ldm.TrainLDMConfig,
}
# What each package may import of ldm, beside itself.
ALLOWED = {
    "files": set(),
    "config": {"files"},
    "keyed": set(),
    "nn": set(),
    "weights": {"files"},
    "folders": {"config", "files"},
    "data": {"config", "files", "keyed", "weights"},
    "vae": {"config", "nn"},
    "unet": {"config", "nn"},
    "text": {"config", "files"},
    "diffusion": {"config"},
    "training": {"config", "data", "files", "keyed", "pictures", "weights"},
    "evaluation": {"data", "diffusion", "keyed"},
    "interop": {"diffusion", "files", "text", "unet", "vae"},
}


def imported(path: Path) -> set[str]:
    """Second parts of all `ldm.*` imports in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "ldm" else {node.module}
    return {name.split(".")[1] for name in found if name.startswith("ldm.")}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / "ldm" / package).rglob("*.py")) or [ROOT / f"ldm/{package}.py"]
    for file in files:
        assert imported(file) <= ALLOWED[package] | {package}, file


def test_diffusion_imports_torch_alone() -> None:
    for file in (ROOT / "ldm/diffusion").glob("*.py"):
        outside = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert outside <= {"torch", "ldm", "pydantic", "math", "typing", "collections", "itertools", "functools"}, file


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_configuration_file_is_read_and_its_models_build(path: Path) -> None:
    stage = path.stem if path.stem in SCRIPTS else "ldm"
    config = SCRIPTS[stage].from_dict(read_yaml(path), source=path.name)
    with torch.device("meta"):
        if isinstance(config, train_vae.TrainVAEConfig):
            VAE(config.vae)
            config.vae.latent_size(config.data.resolution)
        elif isinstance(config, train_clip.TrainCLIPConfig):
            open_clip.CLIP(**config.clip.architecture(config.data.resolution))
        elif isinstance(config, train_ldm.TrainLDMConfig):
            UNet(config.unet)


def test_the_text_width_of_public_towers_fits_their_networks() -> None:
    for folder in ("sd15", "sd21-base", "sd21-v", "sdxl", "images-256"):
        config = train_ldm.TrainLDMConfig.from_dict(read_yaml(ROOT / f"configs/{folder}/ldm.yaml"), source=folder)
        towers = [tower for tower in (config.text, config.second_text) if tower.model != "none"]
        widths = [open_clip.get_model_config(tower.model)["text_cfg"]["width"] for tower in towers]
        assert sum(widths) == config.unet.context_dim
        for tower in towers:
            assert tower.pretrained in open_clip.list_pretrained_tags_by_model(tower.model)


def test_no_file_names_a_machine_or_a_registry() -> None:
    for file in ROOT.glob("requirements*.lock"):
        for line in file.read_text().splitlines():
            assert line.count("==") == 1 and "/" not in line and " " not in line, line
