"""Compare the previews of a model whose decoder was distilled: results/preview.json.

    make demo
    python scripts/distill_decoder.py --model runs/demo/vae/model
    python benchmarks/preview.py runs/demo/vae/model

The linear map, the tiny decoder and the VAE's own, on latents of held-out images: PSNR against what the VAE decodes,
the small images of the linear map enlarged (bilinear), and the time for one image, the least of a second.
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from commit import commit
from PIL import Image

from ldm.data import DataConfig, open_dataset
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.evaluation.machine import fastest_seconds
from ldm.imaging import pil_to_tensor, tensor_to_pil
from ldm.interop.components import ModelComponents
from ldm.io.model_dir import read_manifest
from ldm.pipeline import Pipeline
from ldm.pipeline.load import VAEManifest, load_vae
from ldm.unet import UNet, UNetConfig
from ldm.vae.losses import psnr

ROOT = Path(__file__).parents[1]
NUM_IMAGES, SECONDS = 128, 1.0


def open_pipeline(folder: Path, resolution: int) -> Pipeline:
    """One with the VAE of a train_vae run, and a U-Net that is not used."""
    vae = load_vae(folder)
    unet = UNet(UNetConfig(in_channels=vae.config.latent_channels, model_channels=32, channel_mult=(1,),
                           transformer_depth=(0,), num_heads=(1,)))  # fmt: skip
    return Pipeline(ModelComponents(unet, Diffusion(DiffusionConfig()), vae, None, resolution), folder)


@torch.no_grad()
def measure(folder: Path) -> dict[str, Any]:
    """Both kinds of preview, and the VAE."""
    data = DataConfig.from_dict(read_manifest(folder, "vae", VAEManifest.from_dict).data, source=str(folder))
    pipeline = open_pipeline(folder, data.resolution)
    images = torch.cat(list(open_dataset(data, "test", seed=0).spread_images(NUM_IMAGES)))
    latents = pipeline.encode(images)
    whole = pipeline.decode(latents)
    ways = {
        "linear": pipeline.linear_preview,
        "tiny": pipeline.preview,
        "vae": lambda z: tensor_to_pil(pipeline.decode(z)),
    }
    results: dict[str, Any] = {"data": data.source, "resolution": data.resolution, "images": len(images)}
    for name, way in ways.items():
        size = (data.resolution, data.resolution)
        made = torch.stack([pil_to_tensor(image.resize(size, Image.Resampling.BILINEAR), 3) for image in way(latents)])
        one = latents[:1]
        fastest = fastest_seconds(lambda way=way, one=one: way(one), SECONDS)  # type: ignore[misc]
        results[name] = {"ms": round(1000 * fastest, 2)}
        if name != "vae":
            results[name]["psnr"] = round(psnr(made.to(whole), whole).mean().item(), 2)
    return results


def main() -> None:
    """Measure, and write results/preview.json."""
    torch.set_num_threads(1)
    results = measure(Path(sys.argv[1]))
    machine = {"machine": f"{platform.machine()}, one thread", "torch": torch.__version__, "commit": commit()}
    path = ROOT / "benchmarks/results/preview.json"
    path.write_text(json.dumps({**machine, **results}, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
