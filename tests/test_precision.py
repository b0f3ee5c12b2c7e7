"""Half precision: what computes in it, what stays in float32, and how far images are from those of float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import txt2img
from helpers import build_stage
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.conditioning import Conditioning
from ldm.config import CONFIGS
from ldm.pipeline import Pipeline
from ldm.pipeline.record import read_png
from ldm.planning.cost import FlopMemoryMeter
from ldm.precision import Precision, resolve_precision
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

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


def test_what_overflows_fp16_goes_through_the_vae_in_float32(tiny_model: Path) -> None:
    """With a warning, and nothing else in the batch does: an image depends on no other."""
    full, half = (Pipeline.load(tiny_model, precision=name) for name in ("float32", "fp16"))
    for pipeline in (full, half):
        assert pipeline.vae is not None
        with torch.no_grad():
            for part in (pipeline.vae.encoder, pipeline.vae.decoder):
                part.conv_in.weight.mul_(1e3)
    large, small = (torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * scale for scale in (1e4, 1))
    alone = half.decode(small)
    for action, inputs in (("decode", large), ("encode", torch.full((1, 3, 16, 16), 1e5))):
        expected = getattr(full, action)(inputs)
        with pytest.warns(UserWarning, match="the VAE overflows fp16: these images go through it in float32"):
            found = getattr(half, action)(inputs)
        assert found.isfinite().all() and (found - expected).abs().mean() < 0.02
    with pytest.warns(UserWarning, match="overflows fp16"):
        both = half.decode(torch.cat([large, small]))
    assert both[1:].equal(alone) and both[0].isfinite().all()
    assert half.vae is not None and half.vae.dtype == torch.float16 and half.precision == "fp16"


def test_half_precision_is_not_saved(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its weights rounded to bf16: load the model with precision="):
        Pipeline.load(tiny_model, precision="bf16").save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_guide_computes_in_the_precision_of_the_model(tiny_model: Path) -> None:
    full, half = (Pipeline.load(tiny_model, precision=name) for name in ("float32", "bf16"))
    with pytest.raises(ValueError, match=f"guide model {tiny_model}: load it in bf16, as {tiny_model}"):
        half.set_guide_model(full)


@pytest.mark.parametrize("precision", HALF)
def test_everything_that_generates_does_so_in_half_precision(tiny_model: Path, precision: Precision) -> None:
    """Near to float32, with what each feature adds to sampling: autoguidance, composed prompts, masks, inversion."""
    full, half = (Pipeline.load(tiny_model, precision=name) for name in ("float32", precision))
    image = full("a star")[0]
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 8, 16))
    calls: list[dict[str, Any]] = [
        {"prompt": "a red star AND a (blue:1.3) circle"},
        {"prompt": "a star", "negative_prompt": "a circle", "sampler": "ddim", "eta": 1.0},
        {"prompt": "a star", "image": image, "strength": 0.5, "mask": mask},
        {"prompt": "a star", "image": image, "inversion_prompt": "a circle", "sampler": "euler"},
        {"prompt": "a star", "width": 32, "vae_tile": 4},
    ]
    for pipeline in (full, half):
        pipeline.set_guide_model(Pipeline.load(tiny_model, precision=pipeline.precision))
    for call in calls:
        one, other = (np.asarray(pipeline(steps=4, **call)[0], float) for pipeline in (full, half))
        assert np.abs(one - other).mean() < 2, call


def test_an_image_is_reproduced_in_its_precision(tiny_model: Path, tmp_path: Path) -> None:
    txt2img.main(["a star", "--model", str(tiny_model), "--out", str(tmp_path), "--precision", "bf16"])
    assert read_png(tmp_path / "00000.png").precision == "bf16"
    txt2img.main(["--reproduce", str(tmp_path / "00000.png"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again/00000.png").read_bytes() == (tmp_path / "00000.png").read_bytes()


def test_networks_keep_the_same_activations_under_the_autocast_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, although it would compute norms and upsampling in float32: so plans for GPUs are dry runs of a CPU."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None: q * k.mean() * v.mean())
    two_levels = {"channel_mult": (1, 2), "transformer_depth": (1, 1), "num_heads": (2, 4)}
    activations = {}
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), torch.device(device):
            unet = UNet(UNetConfig(**{"model_channels": 64, "context_dim": 32, **two_levels}))
            vae = VAE(VAEConfig(base_channels=32, channel_mult=(1, 2)))
            torch.set_autocast_enabled(device, True)  # torch.autocast does not without a GPU
            torch.set_autocast_dtype(device, torch.bfloat16)
            with FlopMemoryMeter() as meter:
                prediction = unet(torch.randn(2, 4, 16, 16), torch.ones(2), Conditioning(torch.randn(2, 77, 32)))
                images, _ = vae(torch.randn(2, 3, 32, 32), torch.randn(2, 4, 16, 16))
            torch.set_autocast_enabled(device, False)
            assert prediction.device.type == images.device.type == device
            activations[device] = meter.live_bytes
    assert activations["cuda"] == pytest.approx(activations["cpu"], rel=0.01)


def test_latents_are_encoded_in_float32_whether_cached_or_not(tiny_runs: Path) -> None:
    stage = build_stage("ldm", tiny_runs / "precision", device=torch.device("cpu"))
    images = stage.validation["image"]
    with torch.autocast("cpu", torch.bfloat16):
        z = stage.latents({"image": images}, torch.zeros)
    with torch.no_grad():
        cached = stage.encode_for_cache(images)
    assert z.equal(stage.vae.standardize(cached["mean"]))
