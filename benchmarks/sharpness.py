"""Compare how sharp VAEs are: docs/images/sharpness.png, and results/sharpness.json.

    python benchmarks/sharpness.py runs/emoji-128/vae-l1/model runs/emoji-128/vae/model

For held-out images, the square with most detail beside what each VAE makes of it. PSNR, SSIM and rfd_self are those of
each latent card; `detail` is the sum of what a small blur takes from the reconstructions, over that of the images.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from commit import commit
from PIL import Image
from torch import Tensor

from ldm.config import read_yaml
from ldm.data import DataConfig, open_dataset
from ldm.evaluation.figures import labelled_rows
from ldm.evaluation.latent_card import NUM_IMAGES
from ldm.imaging import save_image, tensor_to_pil
from ldm.io.model_dir import read_manifest
from ldm.pipeline.load import VAEManifest, load_vae

ROOT = Path(__file__).parents[1]
NUM_CROPS, SIDE = 7, 40


def detail(images: Tensor) -> Tensor:
    """What a blur of 3 x 3 pixels takes from each pixel (b, c, h, w), summed over the channels: (b, 1, h, w)."""
    return (images - F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)).abs().sum(1, keepdim=True)


def busiest_squares(images: Tensor) -> list[tuple[int, int]]:
    """The corner (top, left) of the square of each image that has most detail."""
    sums = F.avg_pool2d(detail(images), SIDE, 1)[:, 0]
    return [divmod(int(each.argmax()), each.shape[1]) for each in sums]


def crops(images: Tensor, corners: list[tuple[int, int]]) -> list[Image.Image]:
    """The squares."""
    squares = [image[:, y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(images, corners, strict=True)]
    return tensor_to_pil(torch.stack(squares))


def measure(folder: Path, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Reconstructions of the images, and the figures of a VAE."""
    vae, card = load_vae(folder), json.loads((folder / "latents.json").read_bytes())
    output = torch.cat([vae.decode(vae.encode(part).mean).clamp(-1, 1) for part in images.split(16)])
    figures = {name: card[name] for name in ("psnr", "ssim", "rfd_self") if name in card}
    loss = read_yaml(folder.parent / "config.yaml")["loss"]
    weights = {name: loss[name] for name in ("adversarial_weight", "perceptual_weight")}
    return output, {**weights, **figures, "detail": round((detail(output).sum() / detail(images).sum()).item(), 3)}


@torch.no_grad()
def main() -> None:
    """Measure the VAEs of these model folders, and draw."""
    folders = [Path(folder) for folder in sys.argv[1:]]
    manifest = read_manifest(folders[0], "vae", VAEManifest.from_dict)
    held_out = open_dataset(DataConfig.from_dict(manifest.data, source=str(folders[0])), "test", seed=0)
    images = torch.cat(list(held_out.spread_images(NUM_IMAGES)))
    shown = [i * len(images) // NUM_CROPS for i in range(NUM_CROPS)]
    corners = busiest_squares(images[shown])
    rows, results = {"image": crops(images[shown], corners)}, {}
    for folder in folders:
        output, results[folder.parent.name] = measure(folder, images)
        rows[folder.parent.name] = crops(output[shown], corners)
    save_image(labelled_rows(rows), ROOT / "docs/images/sharpness.png")
    path = ROOT / "benchmarks/results/sharpness.json"
    path.write_text(json.dumps({"commit": commit(), "images": len(images), **results}, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
