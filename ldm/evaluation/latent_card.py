"""The latent card beside a VAE's weights: what its latents are like, as latents.json and latents.png."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from ldm.data import DataConfig, open_dataset
from ldm.evaluation.features import open_extractor
from ldm.evaluation.frechet import frechet_distance
from ldm.evaluation.metrics import FD, missing_metrics
from ldm.imaging import to_8_bits
from ldm.io.atomic import atomic_write, write_text
from ldm.io.model_dir import read_manifest
from ldm.pipeline.load import VAEManifest, load_vae
from ldm.precision import place, resolve_device
from ldm.text.weights import latest_tower
from ldm.vae import VAE
from ldm.vae.equivariance import ScaleTurn
from ldm.vae.losses import has_ssim, psnr, ssim

NUM_IMAGES = 256  # held-out ones
Features = Callable[[Tensor], Tensor]
"""Images (b, c, h, w) in [-1, 1], in steps of 8 bits -> features (b, d)."""


def write_latent_card(folder: Path, *, runs: Path | None = None) -> dict[str, Any]:
    """Measure the VAE of a finished train_vae run on its held-out images, and write both files into its model folder.

    `rfd_self` is measured on the features of the newest train_clip run below `runs`, if there is one.
    """
    manifest = read_manifest(folder, "vae", VAEManifest.from_dict)
    device = resolve_device(None)
    vae = place(load_vae(folder), device)
    held_out = open_dataset(DataConfig.from_dict(manifest.data, source=str(folder)), "test", seed=0)
    images = [batch.to(device) for batch in held_out.spread_images(NUM_IMAGES)]
    features = newest_features(runs, device) if runs else None
    card = {"vae_sha256": manifest.vae_sha256, **measure_latents(vae, images, features=features)}
    draw_card(card, vae, images[0][:1], folder / "latents.png")
    write_text(folder / "latents.json", json.dumps(card, indent=1))
    return card


def newest_features(runs: Path, device: torch.device) -> Features | None:
    """Those of the newest finished train_clip run below `runs`; None where there is none."""
    try:
        name = latest_tower(runs, script="scripts/train_clip.py")
    except ValueError:
        return None
    return open_extractor(name, device)


@torch.no_grad()
def measure_latents(
    vae: VAE,
    batches: Iterable[Tensor],
    *,
    features: Features | None = None,
    distance: Callable[[Tensor, Tensor], float] = frechet_distance,
) -> dict[str, Any]:
    """All numbers of the card, of batches of images (b, c, h, w).

    Moments are those of the posterior's mean, raw; `moved` compares standardized latents. With `features`, and enough
    images for them, `rfd_self` is the `distance` between those of the images and those of their reconstructions.
    """
    latents, quality, pairs = [], [], []
    moved: list[dict[str, float]] = []
    for images in batches:
        mean = vae.encode(images).mean
        output = vae.decode(mean).clamp(-1, 1)
        latents.append(mean.movedim(1, -1).flatten(0, -2).cpu().double())
        measures = (psnr, ssim) if has_ssim(images) else (psnr,)
        quality.append(torch.stack([measure(output, images) for measure in measures]).cpu())
        moved.append(moved_latents(vae, images))
        if features is not None:
            pairs.append(torch.stack([features(images), features(to_8_bits(output))]))
    z, scores = torch.cat(latents), torch.cat(quality, 1)
    card: dict[str, Any] = {
        "images": scores.shape[1],
        "mean": _list(z.mean(0)),
        "deviation": _list(z.std(0)),
        "lowest": _list(z.amin(0)),
        "highest": _list(z.amax(0)),
        "correlation": [_list(row) for row in torch.atleast_2d(z.T.corrcoef())],
        **{name: round(score.item(), 4) for name, score in zip(("psnr", "ssim"), scores.mean(1), strict=False)},
        "moved": {name: float(f"{fmean(batch[name] for batch in moved):.5g}") for name in moved[0]},
    }
    if pairs:
        real, made = torch.cat(pairs, 1)
        if FD not in missing_metrics(real, made):
            card["rfd_self"] = float(f"{distance(real, made):.5g}")
    return card


def moved_latents(vae: VAE, images: Tensor) -> dict[str, float]:
    """How far the latent of a changed image is from the changed latent of the image, relative to the latter's norm.

    Shifts are to the right, by a cell of the latent and by half of one, and leave out the border; where that is all of
    the latent, they are left out.
    """
    factor, z = vae.config.factor, _standard(vae, images)
    height, width = z.shape[-2:]
    half = ScaleTurn(max(1, height // 2), max(1, width // 2))
    turn = ScaleTurn(height, width, 1)
    pairs = {
        "scale by 0.5": (half(images, factor=factor), half(z)),
        "turn by 90 degrees": (turn(images, factor=factor), turn(z)),
    }
    inner: tuple[Any, ...] = (..., slice(1, -1), slice(1, -1))
    if min(height, width) > 2:
        pairs["shift by a cell"] = images.roll(factor, -1), z.roll(1, -1)
        pairs["shift by half a cell"] = images.roll(factor // 2, -1), (z + z.roll(1, -1)) / 2
    moved = {}
    for name, (changed, want) in pairs.items():
        part = inner if name.startswith("shift") else ...
        moved[name] = ((_standard(vae, changed) - want)[part].norm() / want[part].norm()).item()
    return moved


def draw_card(card: dict[str, Any], vae: VAE, image: Tensor, path: Path) -> None:
    """Channels of the latent of an image (1, c, h, w), their means, deviations and ranges, and their correlation."""
    from matplotlib.figure import Figure  # slow to import

    channels = list(range(len(card["mean"])))
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    above, below = cast(Any, figure.subfigures(2, 1, height_ratios=[1, 1.6]))
    shown = channels[:7]
    planes = _standard(vae, image)[0].cpu()
    axes = above.subplots(1, 1 + len(shown), squeeze=False)[0]
    axes[0].imshow(((image[0].cpu() + 1) / 2).movedim(0, -1).clamp(0, 1), cmap="gray")
    axes[0].set_title("image")
    for axis, channel in zip(axes[1:], shown, strict=True):
        axis.imshow(planes[channel], cmap="gray", vmin=-3, vmax=3)
        axis.set_title(f"channel {channel}")
    for axis in axes:
        axis.axis("off")
    left, right = below.subplots(1, 2, width_ratios=[1.6, 1])
    left.vlines(channels, card["lowest"], card["highest"], color="0.75", linewidth=4, label="range")
    left.errorbar(channels, card["mean"], card["deviation"], fmt="o", capsize=4, label="mean and deviation")
    left.set_xlabel("channel of the raw latent")
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.get_major_locator().set_params(integer=True)
    left.legend()
    shades = right.imshow(card["correlation"], cmap="RdBu", vmin=-1, vmax=1)
    below.colorbar(shades, ax=right, label="correlation")
    figure.suptitle(card_line(card))
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, format="png", dpi=90)


def card_line(card: dict[str, Any]) -> str:
    """The fidelity, and how far changes of the image move the latent, in one line."""
    more = [f", {label} {card[name]:g}" for name, label in (("ssim", "SSIM"), ("rfd_self", "rfd_self")) if name in card]
    moved = ", ".join(f"{name} {value:.2f}" for name, value in card["moved"].items())
    return f"PSNR {card['psnr']:.2f} dB{''.join(more)}; moved: {moved}"


@torch.no_grad()
def _standard(vae: VAE, images: Tensor) -> Tensor:
    return vae.standardize(vae.encode(images).mean)


def _list(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.flatten().tolist()]
