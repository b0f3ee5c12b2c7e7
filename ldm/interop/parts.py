"""What foreign formats have in common: the parts of a pipeline, and weights that are checked when they are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.diffusion.process import Process
from ldm.interop.names import Rename, renamed
from ldm.text import TextEncoder
from ldm.unet import UNet
from ldm.vae import VAE


class Parts(NamedTuple):
    """What a pipeline is made of."""

    unet: UNet
    process: Process
    vae: VAE
    text: TextEncoder
    size: int


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError when it is damaged or none."""
    if file.suffix == ".ckpt":
        raise ValueError(f"{file} is a pickle, which can hold code: `python scripts/convert.py` makes it a safe file")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}); fetch it again") from None


def network_of(
    cls: Any, config: Any, tensors: dict[str, Tensor], rename_of: Callable[[Any], Rename], source: str
) -> Any:
    """A frozen network with these tensors; buffers that are ours alone keep their start."""
    network = cls(config)
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("latent_")}
    return fill(network, {**network.state_dict(), **checked(tensors, own, rename_of(config), source)})


def checked(tensors: dict[str, Tensor], own: dict[str, Tensor], rename: Rename, source: str) -> dict[str, Tensor]:
    """`renamed`, with the source in front of what is wrong."""
    try:
        return renamed(tensors, own, rename)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def fill(network: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Give a network these tensors, as float32, and freeze it."""
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network.requires_grad_(False).eval()


def foldable(parts: Parts) -> dict[str, bool]:
    """Settings that no format of the Stable Diffusion family can hold, and whether they stand in the way."""
    unet, vae, text = parts.unet.config, parts.vae, parts.text.config
    return {
        "unet.patch": unet.patch > 1,
        "unet.coordinates": unet.coordinates,
        "unet.vector_width": unet.vector_width > 0,
        "vae.patch": vae.config.patch > 1,
        "process.path": parts.process.config.path not in ("scaled_linear", "linear"),
        "text.padding": text.padding is None,
        "text.normalize": not text.normalize,
    }


def check_foldable(parts: Parts, target: str) -> None:
    """ValueError names the settings that stand in the way of writing these parts."""
    wrong = [name for name, stands in foldable(parts).items() if stands]
    if wrong:
        raise ValueError(f"{target} can not hold this model: {', '.join(wrong)} stand in the way")


def folded(vae: VAE, *, scale: float) -> dict[str, Tensor]:
    """The VAE's tensors, its latent statistics worked into the two 1x1 convolutions so that only `scale` is left."""
    state = {name: tensor.clone() for name, tensor in vae.state_dict().items() if not name.startswith("latent_")}
    mean, std, channels = vae.latent_mean, vae.latent_std * scale, vae.config.latent_channels
    factor = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([mean / std, 2 * std.log()])
    state["quant_conv.weight"] *= factor[:, None, None, None]
    state["quant_conv.bias"] = state["quant_conv.bias"] * factor - shift
    weight = state["post_quant_conv.weight"]
    state["post_quant_conv.bias"] += weight[:, :, 0, 0] @ mean
    state["post_quant_conv.weight"] = weight * std.reshape(1, channels, 1, 1)
    return state
