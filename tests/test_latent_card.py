"""The latent card: its numbers where they are known, and its files beside the weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.evaluation.latent_card import measure_latents, moved_latents, write_latent_card
from ldm.vae import VAE, VAEConfig

PATCHED = VAEConfig(
    patch_size=4, base_channels=32, channel_mult=(1,), num_res_blocks=1, mid_attention=False, latent_channels=12
)


@pytest.fixture
def linear() -> VAE:
    """A VAE that maps each patch by itself, linearly: its networks begin at zero."""
    torch.manual_seed(0)
    vae = VAE(PATCHED).eval()
    assert vae.linear is not None
    vae.linear.init_from_pca(F.interpolate(torch.randn(64, 3, 6, 6), size=32, mode="bicubic").clamp(-1, 1))
    return vae


def test_what_moves_a_latent_that_sees_single_patches(linear: VAE) -> None:
    """Nothing, by a whole cell; by half a cell, and by a turn, much."""
    images = F.interpolate(torch.randn(4, 3, 6, 6), size=32, mode="bicubic").clamp(-1, 1)
    moved = moved_latents(linear, images)
    assert moved["shift by a cell"] == pytest.approx(0, abs=1e-5)
    assert moved["shift by half a cell"] > 0.1 and moved["turn by 90 degrees"] > 0.1 and moved["scale by 0.5"] > 0.1


def test_moments_and_reconstructions_are_those_of_all_batches(linear: VAE) -> None:
    images = F.interpolate(torch.randn(12, 3, 6, 6), size=32, mode="bicubic").clamp(-1, 1)
    seen = []

    def distance(real: torch.Tensor, made: torch.Tensor) -> float:
        seen.extend([real, made])
        return 7.0

    card = measure_latents(linear, images.split(5), features=lambda x: x.mean((2, 3)), distance=distance)
    with torch.no_grad():
        z = linear.encode(images).mean.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(torch.tensor(card["deviation"]), z.std(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(card["correlation"]), z.T.corrcoef(), rtol=1e-3, atol=1e-3)
    assert card["rfd_self"] == 7 and card["images"] == 12 == len(seen[0]) == len(seen[1])
    torch.testing.assert_close(seen[0], images.mean((2, 3)))


def test_the_card_of_a_finished_run_is_beside_its_weights(tiny_runs: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_runs / "vae/model", tmp_path / "model")
    card = write_latent_card(model, runs=tiny_runs)
    assert json.loads((model / "latents.json").read_text()) == card
    assert card["vae_sha256"] == json.loads((model / "model.json").read_text())["vae_sha256"]
    assert len(card["mean"]) == 4 and card["rfd_self"] > 0
    assert "rfd_self" not in write_latent_card(model, runs=tmp_path)
    assert Image.open(model / "latents.png").size[0] > 800
