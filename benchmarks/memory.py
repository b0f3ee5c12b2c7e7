"""How much memory a GPU needs, by dry runs on tensors without numbers, which need no GPU: for docs/performance.md.

    python benchmarks/memory.py

Training is in bf16 autocast with AdamW and averages, in float32; generating in bf16, with guidance. CUDA itself takes
about 1 GiB more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from document import write_table
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.cli import ScriptConfig, command
from ldm.conditioning import Conditioning
from ldm.config import CONFIGS
from ldm.planning.cost import FlopMemoryMeter, dry_run
from ldm.planning.device import format_bytes
from ldm.planning.planner import MachineSpec, read_recipe, recipe_stages
from ldm.text import TextEncoder, combine_encoders
from ldm.unet import UNet
from ldm.vae import VAE
from ldm.vae.tiling import tiled_decode

GPU = MachineSpec(gpus=1, usable_bytes=2**40, device=None, tflops=None)
CONTEXT = 77  # tokens


def training_bytes(recipe: str, side: int, images: int, *, gradient_checkpointing: bool) -> int:
    """Of a step of the U-Net."""
    *_, plan = recipe_stages(CONFIGS / recipe, side, GPU, 10**6)
    return dry_run(plan.build, images, gradient_checkpointing, bf16=True).memory()


def generating_bytes(recipe: str, side: int, tile: int | None) -> int:
    """Of one image: all weights, and the larger peak of a network call and of decoding."""
    config, vae_config = read_recipe(CONFIGS / recipe / "ldm.yaml"), read_recipe(CONFIGS / recipe / "vae.yaml").vae
    unet_config, cells = config.unet, side // vae_config.factor
    with FakeTensorMode(), torch.no_grad(), default_dtype(torch.bfloat16):
        towers = [TextEncoder.random(text, None) for text in (config.text, config.second_text) if text.model != "none"]
        unet, vae, text = UNet(unet_config), VAE(vae_config), combine_encoders(towers)
        weights = sum(2 * p.numel() for network in (unet, vae, text) if network for p in network.parameters())
        cond = Conditioning(
            context=torch.randn(2, CONTEXT, unet_config.context_dim),
            pooled=torch.randn(2, unet_config.pooled_dim) if unet_config.pooled_dim else None,
            sizes=torch.zeros(2, 6) if unet_config.size_embed_dim else None,
        )
        z = torch.randn(2, unet_config.in_channels, cells, cells)
        latents = z[:1].clone()
        decode: Callable[[], object] = partial(vae.decode, latents)
        if tile:
            decode = partial(tiled_decode, vae.decode, latents, factor=vae_config.factor, tile=tile)
        peaks = []
        for call in (partial(unet, z, torch.ones(1), cond), decode):
            with FlopMemoryMeter() as meter:
                call()
            peaks.append(meter.peak_bytes)
    return weights + max(peaks)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(config: ScriptConfig) -> None:
    """Write the table."""
    rows = []
    for recipe, side in (("sd21-base", 512), ("sdxl", 1024)):
        for images, recompute in ((8, False), (8, True), (1, True)):
            found = format_bytes(training_bytes(recipe, side, images, gradient_checkpointing=recompute))
            how = f"micro-batches of {images}" + ", gradient checkpointing" * recompute
            rows.append([recipe, f"train at {side} x {side}", how, found])
            print(rows[-1], flush=True)
    for recipe, side in (("sd21-base", 512), ("sd21-base", 1024), ("sdxl", 1024)):
        for tile in (None, 64):
            how = f"--vae-tile {tile}" if tile else ""
            rows.append([recipe, f"generate {side} x {side}", how, format_bytes(generating_bytes(recipe, side, tile))])
            print(rows[-1], flush=True)
    write_table("memory", ["recipe", "what", "how", "memory"], rows)


main = command(ScriptConfig, run, __doc__)

if __name__ == "__main__":
    main()
