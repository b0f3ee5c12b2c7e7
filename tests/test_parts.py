"""Images that go through networks in parts, as their pixels exceed what these take at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_stage, on_ranks

from ldm.parts import images_at_once
from ldm.pipeline import Pipeline
from ldm.vae import VAE, VAEConfig

TWO_IMAGES = 2 * 16 * 16  # pixels


def take_two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vae.model.VAE", "stages.vae.VAE", "pipeline.pipeline.UNET", "stages.diffusion.UNET"):
        monkeypatch.setattr(f"ldm.{name}_PIXELS", TWO_IMAGES)


def test_large_images_go_one_by_one() -> None:
    assert images_at_once((512, 512), 2**20) == 4
    assert images_at_once((1024, 1024), 2**20) == images_at_once((4096, 4096), 2**20) == 1


def test_the_vae_makes_the_same_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vae, images, sizes = VAE(VAEConfig(base_channels=32, channel_mult=(1, 2))), torch.rand(5, 3, 16, 16), list[int]()
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    whole = vae.encode(images)
    decoded = vae.decode(whole.mean)
    take_two_at_once(monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(images).mean, whole.mean)
        torch.testing.assert_close(vae.decode(whole.mean), decoded)
    assert sizes == [5, 5, 2, 2, 1, 2, 2, 1]


def test_images_are_those_of_parts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, prompts = Pipeline.load(tiny_model), ["a star", "a red star", "a circle"]
    whole = pipeline.sample(prompts, range(3), steps=2, guidance_scale=2.0)
    take_two_at_once(monkeypatch)
    torch.testing.assert_close(pipeline.sample(prompts, range(3), steps=2, guidance_scale=2.0), whole)


@pytest.mark.parametrize("name", ["vae", "ldm"])
def test_a_validation_of_parts_is_that_of_all(name: str, tiny_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank and on three, each of which measures about a third."""
    stage = build_stage(name, tiny_runs / "parts", device=torch.device("cpu"))
    with torch.no_grad():
        whole = stage.validate()
    take_two_at_once(monkeypatch)
    with torch.no_grad():
        assert stage.validate() == pytest.approx(whole, rel=1e-4)

    def validate(ranks: Any) -> dict[str, float]:
        with torch.no_grad():  # of this thread
            measured: dict[str, float] = stage.validate(ranks)
            return measured

    assert all(found == pytest.approx(whole, rel=1e-4) for found in on_ranks(3, validate))
