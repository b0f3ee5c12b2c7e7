"""What the VAE can be trained on: L2, features of an OpenCLIP image tower, LPIPS, and EQ-VAE."""

import json
import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import train
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from ldm.data import DataConfig
from ldm.rng import StepRNG
from ldm.stages.vae import TrainVAEConfig, VAEStage, load_perceptual
from ldm.text.image_tower import ImageTower
from ldm.vae import VAE, Posterior, VAEConfig
from ldm.vae.equivariance import ScaleTurn, draw_scale_turn
from ldm.vae.losses import VAELossConfig, vae_loss
from ldm.vae.perceptual import LPIPS, FeatureDistance

HEADS = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def posterior(images: Tensor) -> Posterior:
    """A standard normal one, whose KL is 0."""
    zeros = torch.zeros(len(images), 2, 4, 4)
    return Posterior(zeros, zeros)


def test_each_term_has_its_weight() -> None:
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    config = VAELossConfig(pixel_loss="l2", ssim_weight=0, perceptual_weight=3)
    terms = vae_loss(x, y, posterior(x), config, lambda a, b: (a - b).mean())
    assert terms.keys() == {"loss", "l2", "kl", "perceptual"}
    torch.testing.assert_close(terms["loss"], F.mse_loss(y, x) + 3 * (y - x).mean())
    assert vae_loss(x, y, posterior(x), VAELossConfig(ssim_weight=0))["loss"] == F.l1_loss(y, x)


# Features.


class TwoScales(nn.Module):
    """The pixels, and means of four: features that are known."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, F.avg_pool2d(images, 2)]


def test_the_feature_distance_is_that_of_directions() -> None:
    """2 - 2 cosine, whatever the length; grey images count as three equal channels."""
    distance, x, y = FeatureDistance(TwoScales()), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    cosines = [F.cosine_similarity(a, b).mean() for a, b in zip(TwoScales()(x), TwoScales()(y), strict=True)]
    torch.testing.assert_close(distance(x, y), 2 - sum(cosines))
    assert distance(x, 5 * x) == pytest.approx(0, abs=1e-6)
    assert distance(x[:, :1].abs(), y[:, :1].abs()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("where", [0.0, 1.0])
def test_no_gradient_is_nan_where_images_are_equal_or_features_are_zero(where: float) -> None:
    x = torch.full((1, 3, 4, 4), where, requires_grad=True)
    FeatureDistance(TwoScales())(x, torch.full((1, 3, 4, 4), where)).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_the_image_tower_of_a_clip_run_is_open_clips(tiny_runs: Path) -> None:
    folder = tiny_runs / "clip/model"
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    image.putpixel((3, 5), (0, 255, 0))
    tower = ImageTower.load(f"local-dir:{folder}")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)[None]
    with torch.no_grad():
        [want] = model.visual.forward_intermediates(preprocess(image)[None])["image_intermediates"]
        [features] = tower(pixels / 127.5 - 1)
    torch.testing.assert_close(features, want, rtol=1e-4, atol=1e-5)
    assert features.shape == (1, 32, 2, 2) and not any(p.requires_grad for p in tower.parameters())


def test_a_vae_learns_from_the_features_of_the_latest_clip_run(tiny_runs: Path, tmp_path: Path) -> None:
    """They are logged, validated and frozen, and have their part in the gradient."""
    (tmp_path / "clip").symlink_to(tiny_runs / "clip")
    train("vae", tmp_path / "vae", "--loss.perceptual-weight=0.5", "--steps=1")
    line, validation = (json.loads(line) for line in (tmp_path / "vae/log.jsonl").read_text().splitlines())
    assert line["loss"] == pytest.approx(line["l1"] + 0.1 * line["structure"] + 0.5 * line["perceptual"], rel=1e-2)
    assert 0 < validation["validation_perceptual"] < 2
    [weights] = (tmp_path / "vae/checkpoints/step-000001").glob("vae.safetensors")
    assert weights.stat().st_size < 1e6  # without the tower


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perceptual": "latest"}, "no finished text tower below .*: run `make one` first"),
        ({"perceptual": "local-dir:nowhere"}, "image tower local-dir:nowhere has no open_clip_config.json: train one"),
        ({"perceptual": "ViT-X"}, "image tower 'ViT-X' is not in open_clip: pass one"),
        ({"perceptual": "ViT-B-32"}, "image tower ViT-B-32: set its pretrained tag to one of openai, .*, not None"),
        ({"perceptual": "lpips", "lpips_files": ("vgg", "heads")}, "lpips_files: there is no vgg: download it"),
    ],
)
def test_features_that_are_not_there_are_named(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_perceptual(VAELossConfig(perceptual_weight=1, **settings), tmp_path, "make one")


def test_a_clip_without_an_image_tower_is_refused(tiny_runs: Path, tmp_path: Path) -> None:
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).write_bytes((tiny_runs / "clip/model" / name).read_bytes())
    save_file({"text_projection": torch.zeros(2, 2)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="image tower local-dir:.* has no weights in .*: pass a CLIP with both towers"):
        ImageTower.load(f"local-dir:{tmp_path}")


# LPIPS.


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files as torchvision and LPIPS publish them, with random weights."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.save({f"features.{n}": t for n, t in make_layers(cfgs["D"]).state_dict().items()}, folder / "vgg16.pth")
    torch.save(HEADS, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


def test_lpips_is_the_weighted_distance_of_five_layers(lpips_files: tuple[Path, Path]) -> None:
    """Computed here from torchvision's network, in the values of ImageNet that LPIPS uses."""
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    features = make_layers(cfgs["D"])
    features.load_state_dict({n.removeprefix("features."): t for n, t in torch.load(lpips_files[0]).items()})
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    want = torch.zeros(())
    with torch.no_grad():
        for end, head in zip((4, 9, 16, 23, 30), HEADS.values(), strict=True):
            a, b = (F.normalize(features[:end](((v + 1) / 2 - mean) / std), dim=1) for v in (x, y))
            want = want + ((a - b).square() * head).sum(1).mean()
        lpips = LPIPS.load(*lpips_files)
        torch.testing.assert_close(lpips(x, y), want, rtol=1e-4, atol=1e-6)
    x.requires_grad_()
    lpips(x, x.detach()).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_lpips_files_that_do_not_fit_are_refused(lpips_files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"vgg.pth does not fit this network: 26 tensors differ"):
        LPIPS.load(lpips_files[1], lpips_files[1])
    with pytest.raises(ValidationError, match="perceptual lpips, lpips_files None: lpips needs both of its files"):
        VAELossConfig(perceptual="lpips", perceptual_weight=1)


# EQ-VAE.


def test_latents_and_images_are_changed_alike() -> None:
    """For a VAE that only moves pixels to channels, turning after encoding is turning before it."""
    images = F.interpolate(torch.rand(2, 3, 4, 6), scale_factor=4, mode="nearest")  # of blocks
    latents = F.avg_pool2d(images, 4)
    for turns in range(4):
        change = ScaleTurn(4, 6, turns)
        torch.testing.assert_close(F.avg_pool2d(change(images, factor=4), 4), change(latents))
    assert ScaleTurn(2, 3, 1)(images, factor=4).shape == (2, 3, 12, 8)
    assert torch.equal(ScaleTurn(4, 6)(latents), latents)


def test_scales_and_turns_are_drawn_from_their_ranges() -> None:
    drawn = [draw_scale_turn(random.Random(seed), 16, 32, smallest=3) for seed in range(300)]
    assert {change.turns for change in drawn} == {0, 1, 2, 3}
    assert {change.height for change in drawn} == set(range(4, 17))
    assert all(abs(change.width - 2 * change.height) <= 1 for change in drawn)
    assert min(draw_scale_turn(random.Random(seed), 16, 16, smallest=9).height for seed in range(300)) == 9


def test_what_is_decoded_is_the_changed_latent(tmp_path: Path) -> None:
    config = VAEConfig(base_channels=32, channel_mult=(1, 2), num_res_blocks=1, latent_channels=3)
    vae, images, noise = VAE(config), torch.rand(1, 3, 16, 16), torch.zeros(1, 3, 8, 8)
    change = ScaleTurn(4, 4, 2)
    with torch.no_grad():
        output, found = vae(images, noise, change)
        torch.testing.assert_close(output, vae.decode(change(found.mean)))
    train("vae", tmp_path / "vae", "--loss.equivariance-probability=0.9")
    train("vae", tmp_path / "accumulated", "--loss.equivariance-probability=0.9", "--grad-accum-steps=2")
    runs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("vae", "accumulated")]
    one, two = ([json.loads(line)["loss"] for line in run[:4]] for run in runs)
    assert one == pytest.approx(two, rel=1e-5)


# Noise on the latents that are decoded.


def test_noise_on_latents_is_relative_to_the_deviation_of_each_channel() -> None:
    """To the one that the step before measured, on all its micro-batches; none in the first step."""
    vae = VAEConfig(base_channels=32, channel_mult=(1, 2), num_res_blocks=1, latent_channels=3)
    stage = VAEStage(TrainVAEConfig(vae=vae, loss=VAELossConfig(latent_noise=0.5), data=DataConfig(resolution=16)))
    seen, networks = [], {"vae": stage.vae}
    stage.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    stage.vae.post_quant_conv = nn.Identity()
    batches = [{"image": torch.rand(4, 3, 16, 16), "sizes": torch.empty(0), "caption": []} for _ in range(2)]
    rng = StepRNG(0, 0, [0, 1, 2, 3], 4, torch.device("cpu"))
    for batch in batches:
        stage.loss("vae", networks, batch, rng)
    stage.after_step(lambda values: values)
    expected = torch.cat(seen).transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(stage.latent_std, expected)
    stage.latent_std[1] = 0
    stage.loss("vae", networks, batches[1], rng)
    noise = seen[2] - seen[1]
    assert noise[:, 1].abs().max() == 0
    levels = noise[:, [0, 2]].flatten(2).std(2) / expected[[0, 2]]
    assert levels.min() > 0.01 and levels.max() < 0.75  # of 0.5 at most, as 64 draws have it
    assert stage.state_dict() == {"latent_std": stage.latent_std.tolist()}
