"""Half precision: what computes in it, what stays in float32, and how far images are from those of float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
import txt2img
from helpers import build_stage
from torch import Tensor

from ldm.config import CONFIGS
from ldm.pipeline import Pipeline
from ldm.pipeline.record import read_png
from ldm.precision import Precision, resolve_precision

SHIPPED = CONFIGS.with_name("models") / "characters"
HALF: list[Precision] = ["bf16", "fp16"]


@pytest.mark.parametrize("precision", HALF)
def test_images_are_those_of_float32(precision: Precision) -> None:
    """Within 1 of 255, on average."""
    images = [
        np.stack([np.asarray(image, float) for image in pipeline("a cat astronaut", num_images=2)])
        for pipeline in (Pipeline.load(SHIPPED, precision=name) for name in ("float32", precision))
    ]
    assert 0 < np.abs(images[0] - images[1]).mean() < 1


def test_statistics_and_latents_stay_in_float32(tiny_model: Path) -> None:
    pipeline = Pipeline.load(tiny_model, precision="bf16")
    assert pipeline.precision == "bf16" and pipeline.vae is not None and pipeline.text is not None
    networks = (pipeline.unet, pipeline.text, pipeline.vae.encoder, pipeline.vae.decoder)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.bfloat16}
    assert pipeline.vae.latent_mean.dtype == pipeline.vae.latent_std.dtype == torch.float32
    seen: list[Tensor] = []
    pipeline("a star", on_step=lambda index, step: seen.extend([step.z, step.denoised]))
    assert {tensor.dtype for tensor in seen} == {torch.float32}
    assert pipeline.encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float32


def test_the_default_is_bf16_on_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for has_bf16, expected in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert resolve_precision(None, gpu) == expected
        assert resolve_precision(None, cpu) == "float32"
        assert resolve_precision("fp16", gpu) == "fp16"


def test_a_vae_that_overflows_decodes_in_float32(tiny_model: Path) -> None:
    """With a word about it, once."""
    pipelines = [Pipeline.load(tiny_model, precision=name) for name in ("float32", "fp16")]
    for pipeline in pipelines:
        assert pipeline.vae is not None
        with torch.no_grad():
            pipeline.vae.decoder.conv_in.weight.mul_(1e4)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 100
    expected = pipelines[0].decode(latents)
    with pytest.warns(UserWarning, match="the VAE overflows fp16: it decodes in float32"):
        images = pipelines[1].decode(latents)
    assert images.isfinite().all() and (images - expected).abs().mean() < 0.02
    assert pipelines[1].decode(latents).equal(images)
    assert pipelines[1].precision == "fp16", "the U-Net goes on"


def test_an_image_is_reproduced_in_its_precision(tiny_model: Path, tmp_path: Path) -> None:
    txt2img.main(["a star", "--model", str(tiny_model), "--out", str(tmp_path), "--precision", "bf16"])
    assert read_png(tmp_path / "00000.png").precision == "bf16"
    txt2img.main(["--reproduce", str(tmp_path / "00000.png"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again/00000.png").read_bytes() == (tmp_path / "00000.png").read_bytes()


def test_latents_are_encoded_in_float32_whether_cached_or_not(tiny_runs: Path) -> None:
    stage = build_stage("ldm", tiny_runs / "precision", device=torch.device("cpu"))
    images = stage.validation["image"]
    with torch.autocast("cpu", torch.bfloat16):
        z = stage.latents({"image": images}, torch.zeros)
    with torch.no_grad():
        cached = stage.encode_for_cache(images)
    assert z.equal(stage.vae.standardize(cached["mean"]))
