"""Model folders: their manifests, and reading and writing the components of a pipeline."""

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ldm.config import Config
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.interop import compvis, diffusers
from ldm.interop.components import ModelComponents
from ldm.io.atomic import write_tensors, write_text
from ldm.io.model_dir import (
    MODEL_FORMAT,
    VOCABULARY_FILES,
    model_kind,
    read_json,
    read_manifest,
    read_vocabulary,
    write_manifest,
)
from ldm.io.tensors import check_finite, load_weights, save_weights, sha256, weights_sha256
from ldm.text import TextConditioner, TextConfig, TextEncoder, combine_encoders
from ldm.text.weights import LOCAL
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig
from ldm.vae.tiny import TinyDecoder

UNET_FILE, VAE_FILE, PREVIEW_FILE = "unet.safetensors", "vae.safetensors", "preview.safetensors"
TEXT_FOLDERS = ("text", "second_text")

Network = TypeVar("Network", bound=nn.Module)


class PipelineManifest(Config):
    """The model.json of a pipeline."""

    resolution: int
    metadata: dict[str, Any]
    null_prompt: Literal[""] = ""
    diffusion: DiffusionConfig
    unet: UNetConfig
    vae: VAEConfig | None
    vae_sha256: str | None
    text: TextConfig | None
    second_text: TextConfig | None = None


class VAEManifest(Config):
    """The model.json of a VAE."""

    data: dict[str, Any]
    vae: VAEConfig
    vae_sha256: str


def load_components(path: Path, *, pickles: bool = False) -> ModelComponents:
    """Read a model: a folder, ours or of diffusers, or a CompVis file; ValueError: none, incomplete, or a wrong VAE.

    With `pickles` also one whose weights are in pickles, without their code.
    """
    check_exists(path)
    if path.is_file():
        return compvis.read(path, pickles=pickles)
    if holds_vae_alone(path):
        raise ValueError(f"{path} is a VAE alone, for --vae of train_ldm.py: pass a whole model")
    return diffusers.read(path, pickles=pickles) if (path / "model_index.json").is_file() else _read_folder(path)


def check_exists(path: Path) -> None:
    """ValueError where there is no file or folder."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: pass a model folder, a diffusers folder or a single file")


def holds_vae_alone(folder: Path) -> bool:
    """Whether this is the model folder of a VAE, or the folder vae/ of diffusers."""
    config = folder / "config.json"
    is_theirs = config.is_file() and read_json(config).get("_class_name") == diffusers.VAE_FIXED["_class_name"]
    return is_theirs or model_kind(folder) == "vae"


def weights_file(path: Path) -> Path:
    """The file that `load_components` reads the U-Net of a model from; of several, the first."""
    return path if path.is_file() else min(path.glob("unet/*.safetensors"), default=path / UNET_FILE)


def save_components(components: ModelComponents, folder: Path) -> None:
    """Write a model folder; its manifest is last, so a folder that has one is complete."""
    unet, diffusion, vae, text, resolution, vocabulary, metadata = components
    save_weights(unet, folder / UNET_FILE)
    vae_sha256 = save_weights(vae, folder / VAE_FILE) if vae else None
    write_text(folder / VOCABULARY_FILES[MODEL_FORMAT], "\n".join(vocabulary))
    towers: dict[str, TextConfig | None] = dict.fromkeys(TEXT_FOLDERS)
    for name, encoder in zip(TEXT_FOLDERS, text.encoders if text else (), strict=False):
        towers[name] = encoder.config.model_copy(update={"model": encoder.save(folder / name)})
    manifest = PipelineManifest(
        resolution=resolution,
        metadata=dict(metadata),
        diffusion=diffusion.config,
        unet=unet.config,
        vae=vae.config if vae else None,
        vae_sha256=vae_sha256,
        **towers,
    )
    write_manifest(folder, "pipeline", manifest.to_dict())


def load_vae(path: Path) -> VAE:
    """The frozen VAE, on the CPU, of a VAE alone or of a whole model in any format; ValueError: there is none.

    A folder of train_vae, of diffusers (also without a U-Net, or with one that cannot be read) or a single file.
    """
    check_exists(path)
    if path.is_file():
        return compvis.read_vae(path)
    if model_kind(path) == "vae":
        return _build_frozen(VAE, read_manifest(path, "vae", VAEManifest.from_dict).vae, path / VAE_FILE)
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return diffusers.read_vae(folder)
    vae = load_components(path).vae
    if vae is None:
        raise ValueError(f"{path} was trained in pixels and has no VAE: pass the model folder of a train_vae run")
    return vae


def save_vae(vae: VAE, folder: Path, data: dict[str, Any] | None = None) -> None:
    """Write the model folder of a VAE alone, with the settings of the data that it was trained on, where known."""
    digest = save_weights(vae, folder / VAE_FILE)
    write_manifest(folder, "vae", VAEManifest(data=data or {}, vae=vae.config, vae_sha256=digest).to_dict())


def save_preview_decoder(decoder: TinyDecoder, folder: Path, vae_sha256: str) -> None:
    """Write a tiny decoder into a model folder, with the hash of the VAE that it imitates."""
    check_finite(decoder.state_dict(), folder / PREVIEW_FILE)
    write_tensors(folder / PREVIEW_FILE, decoder.state_dict(), {"vae_sha256": vae_sha256})


def load_preview_decoder(folder: Path, config: VAEConfig) -> TinyDecoder | None:
    """The tiny decoder of a model folder, on the CPU, if it has one; ValueError: damaged, or of another VAE."""
    path, again = folder / PREVIEW_FILE, "run scripts/distill_decoder.py again, or remove it"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {again}") from None
    vae = _build_frozen(VAE, config, folder / VAE_FILE)  # in float32, as the decoder was distilled
    if metadata.get("vae_sha256") != weights_sha256(vae):
        raise ValueError(f"{path} imitates another VAE than that of this model: {again}")
    with torch.device("meta"):
        decoder = TinyDecoder(config)
    load_weights(decoder, path)
    return decoder.requires_grad_(False).eval()


def _read_folder(folder: Path) -> ModelComponents:
    manifest = read_manifest(folder, "pipeline", PipelineManifest.from_dict)
    vae = _build_frozen(VAE, manifest.vae, folder / VAE_FILE) if manifest.vae else None
    if vae is not None and sha256(folder / VAE_FILE) != manifest.vae_sha256:
        raise ValueError(f"{folder / VAE_FILE} is not the VAE that this U-Net was trained on: put that one back")
    unet, text = _build_frozen(UNet, manifest.unet, folder / UNET_FILE), _load_text(manifest, folder)
    diffusion, vocabulary = Diffusion(manifest.diffusion), tuple(read_vocabulary(folder))
    return ModelComponents(unet, diffusion, vae, text, manifest.resolution, vocabulary, manifest.metadata)


def _build_frozen(network: type[Network], config: Config, weights: Path) -> Network:
    with torch.device("meta"):
        module = network(config)
    load_weights(module, weights)
    return module.requires_grad_(False).eval()


def _load_text(manifest: PipelineManifest, folder: Path) -> TextConditioner | None:
    encoders = []
    for config in filter(None, (manifest.text, manifest.second_text)):
        name = config.model.removeprefix(LOCAL)  # of a folder in this one
        model_id = f"{LOCAL}{folder / name}" if config.model.startswith(LOCAL) else config.model
        encoders.append(TextEncoder.load(config, model_id=model_id))
    return combine_encoders(encoders)
