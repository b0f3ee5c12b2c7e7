"""Model folders: read back, refused when they are of another kind or format, and those of ldm-model-1."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.interop.components import ModelComponents
from ldm.io.model_dir import latest_model, read_json, read_manifest, read_vocabulary
from ldm.pipeline import Pipeline
from ldm.pipeline.load import PipelineManifest, VAEManifest, load_components, load_vae, save_components
from ldm.text import TextConditioner, TextConfig, TextEncoder
from ldm.text.tower import TextTower
from ldm.text.weights import CONVERTED
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

# The manifest that `components` had in ldm-model-1, by its names of that time.
DATA_1 = {
    "source": "shapes", "size": 32, "bucket_step": 0, "channels": 3, "flip": True, "streams": 8, "font": None,
    "max_unreadable": 0.01,
}  # fmt: skip
DIFFUSION_1 = {
    "path": "flow", "zero_terminal_snr": False, "shift": 1.0, "prediction": "x0", "min_snr_gamma": 5.0,
    "snr_floor": 1.0, "soft_min_snr_gamma": None, "p2_gamma": None, "times": "stratified", "log_normal": [-1.2, 1.2],
}  # fmt: skip
UNET_1 = {
    "in_channels": 4, "extra_channels": 0, "patch": 2, "channels": 64, "multipliers": [1, 2], "blocks": 1,
    "depths": [0, 1], "middle_depth": 1, "heads": [2, 4], "context_width": 16, "vector_width": 12, "size_width": 0,
    "scale_shift": True, "coordinates": True,
}  # fmt: skip
VAE_1 = {
    "image_channels": 3, "patch": 4, "channels": 32, "multipliers": [1], "blocks": 1, "attention": False,
    "latent_channels": 4,
}  # fmt: skip
TEXT_1 = {
    "model": "local-dir:text", "pretrained": None, "layer": "penultimate", "normalize": False, "padding": None,
    "pooled": True, "zero_empty": True,
}  # fmt: skip
PIPELINE_1 = {
    "format": "ldm-model-1", "kind": "pipeline", "size": 32, "about": {"data": DATA_1, "guidance_scale": 2.5},
    "null_prompt": "", "process": DIFFUSION_1, "unet": UNET_1, "vae": VAE_1, "text": TEXT_1,
}  # fmt: skip


@pytest.fixture
def components() -> ModelComponents:
    """A random model of all parts."""
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            patch_size=2,
            model_channels=64,
            channel_mult=(1, 2),
            num_res_blocks=1,
            transformer_depth=(0, 1),
            num_heads=(2, 4),
            context_dim=16,
            pooled_dim=12,
            scale_shift_norm=True,
            coord_conv=True,
            norm_min_group_channels=8,
        )
    )
    vae = VAE(VAEConfig(patch_size=4, base_channels=32, channel_mult=(1,), num_res_blocks=1, mid_attention=False))
    tower = TextTower({"embed_dim": 12, "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 2}})
    for parameter in (*tower.parameters(), *(p for p in unet.parameters() if not p.any())):
        torch.nn.init.normal_(parameter, std=0.1)
    config = TextConfig(layer="penultimate", final_layer_norm=False, use_pooled=True, zero_empty_prompt=True)
    text = TextConditioner(TextEncoder(tower, config, model_id=CONVERTED, weights=Path()))
    diffusion = DiffusionConfig(
        noise_schedule="flow",
        prediction="x0",
        loss_weighting="min_snr",
        gamma=5,
        snr_floor=1,
        t_distribution="stratified",
    )
    data = {"source": "shapes", "resolution": 32, "bucket_step": 0, "channels": 3, "random_flip": True,
            "shard_streams": 8, "emoji_font": None, "max_unreadable": 0.01}  # fmt: skip
    metadata = {"data": data, "guidance_scale": 2.5}
    return ModelComponents(unet, Diffusion(diffusion), vae, text, 32, ("a", "circle", "red"), metadata)


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write a model.json as it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(values))


def as_format_1(folder: Path) -> Path:
    """Turn the folder of `components` into the one that was written then."""
    manifest = json.loads((folder / "model.json").read_text())
    write_manifest(folder, PIPELINE_1 | {"vae_sha256": manifest["vae_sha256"]})
    (folder / "vocab.txt").rename(folder / "words.txt")
    return folder


def image(path: Path) -> np.ndarray:
    """What a model generates."""
    return np.asarray(Pipeline.load(path)("a red circle", steps=2, guidance_scale=2.0, seed=3)[0])


def test_a_folder_is_read_back(components: ModelComponents, tmp_path: Path) -> None:
    save_components(components, tmp_path)
    found = load_components(tmp_path)
    assert found.unet.config == components.unet.config and found.diffusion.config == components.diffusion.config
    assert (found.resolution, found.vocabulary, found.metadata) == components[4:]
    for name, tensor in components.unet.state_dict().items():
        assert torch.equal(found.unet.state_dict()[name], tensor)


def test_folders_of_format_1_are_read(components: ModelComponents, tmp_path: Path) -> None:
    """Under the names of today, with the groups of norms that were fixed then; the images are the same."""
    save_components(components, tmp_path)
    want, expected = image(tmp_path), read_manifest(tmp_path, "pipeline", PipelineManifest.from_dict)
    as_format_1(tmp_path)
    assert read_manifest(tmp_path, "pipeline", PipelineManifest.from_dict) == expected
    assert read_vocabulary(tmp_path) == ["a", "circle", "red"]
    assert (image(tmp_path) == want).all()


def test_towers_and_vaes_of_format_1_are_read(components: ModelComponents, tmp_path: Path) -> None:
    save_components(components, tmp_path / "vae/model")
    write_manifest(tmp_path / "clip/model", {"format": "ldm-model-1", "kind": "text tower", "data": "shapes"})
    values = {"format": "ldm-model-1", "kind": "vae", "data": DATA_1, "vae": VAE_1, "vae_sha256": "1"}
    write_manifest(tmp_path / "vae/model", values)
    assert latest_model("text tower", tmp_path, script="train") == tmp_path / "clip/model"
    assert components.vae is not None
    assert load_vae(latest_model("vae", tmp_path, script="train")).config == components.vae.config
    data = read_manifest(tmp_path / "vae/model", "vae", VAEManifest.from_dict).data
    assert data == components.metadata["data"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({"min_snr_gamma": 5}, {"loss_weighting": "min_snr", "gamma": 5}),
        ({"snr_floor": 1}, {"loss_weighting": "min_snr", "snr_floor": 1}),
        ({"min_snr_gamma": 5, "snr_floor": 1}, {"loss_weighting": "min_snr", "gamma": 5, "snr_floor": 1}),
        ({"soft_min_snr_gamma": 4}, {"loss_weighting": "soft_min_snr", "gamma": 4}),
        ({"p2_gamma": 1}, {"loss_weighting": "p2", "gamma": 1}),
    ],
)
def test_loss_weightings_of_format_1(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    none = {"min_snr_gamma": None, "snr_floor": None, "soft_min_snr_gamma": None, "p2_gamma": None}
    write_manifest(tmp_path, PIPELINE_1 | {"process": DIFFUSION_1 | none | old, "vae_sha256": None})
    shared = {"noise_schedule": "flow", "prediction": "x0", "t_distribution": "stratified"}
    expected = DiffusionConfig.from_dict(shared | new, source="test")
    assert read_manifest(tmp_path, "pipeline", PipelineManifest.from_dict).diffusion == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "ldm-model-0"}, "model.json has format ldm-model-0, .*ldm-model-2 and ldm-model-1: read it with"),
        ({"format": None}, "model.json has format None"),
        ({"kind": "vae"}, "expected a pipeline, found a vae: pass RUN/model of a finished train_ldm run"),
        ({"kind": None}, "expected a pipeline, found a None"),
        ({"process": DIFFUSION_1 | {"paths": "flow"}}, "model.json: diffusion.paths: unknown key"),
        ({"unet": [UNET_1]}, "model.json: unet: "),
        ({"about": None}, "model.json: metadata: "),
    ],
)
def test_other_manifests_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, PIPELINE_1 | {"vae_sha256": None} | change)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path, "pipeline", PipelineManifest.from_dict)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_in_the_encoding_that_it_has(encoding: str, tmp_path: Path) -> None:
    """Not in that of the system, which on Windows would read other tokens than a tokenizer has."""
    (tmp_path / "vocab.json").write_bytes('{"é": 1, "猫": 2}'.encode(encoding))
    assert read_json(tmp_path / "vocab.json") == {"é": 1, "猫": 2}


def test_folders_that_are_not_models(components: ModelComponents, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a model folder .no model.json|has no model.json.: pass RUN/model"):
        read_manifest(tmp_path, "pipeline", PipelineManifest.from_dict)
    for content in (b"", b"{", b"[1]", b"\xff", b'{"a":' * 100_000):
        (tmp_path / "model.json").write_bytes(content)
        with pytest.raises(ValueError, match="model.json is damaged"):
            read_manifest(tmp_path, "pipeline", PipelineManifest.from_dict)
    save_components(components, tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="vocab.txt is missing: copy the folder again"):
        load_components(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="vocab.txt is not UTF-8"):
        load_components(tmp_path)
