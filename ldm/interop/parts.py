"""What foreign formats have in common: the parts of a pipeline, and weights that are checked when they are read."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.diffusion.process import Process
from ldm.interop.names import Rename, renamed
from ldm.text import JoinedEncoder, Text, TextConfig, TextEncoder
from ldm.text.encoder import CONVERTED, TextTower, make_tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

VOCABULARY = 49_408  # of CLIP
NARROW = 256  # below, our U-Net has fewer than the 32 norm groups of the family
HEAD = 64  # width of a head where heads can not be seen from shapes


class Parts(NamedTuple):
    """What a pipeline is made of."""

    unet: UNet
    process: Process
    vae: VAE
    text: Text
    size: int

    @property
    def kind(self) -> str:
        """Which member of the family this is, as its text and channels tell."""
        openai = self.text.encoders[0].tower.blocks[0].quick_gelu
        version = "XL" if isinstance(self.text, JoinedEncoder) else "1" if openai else "2"
        inpainting = " for inpainting" if self.unet.config.extra_channels else ""
        process = self.process.config
        zero = " at zero terminal SNR" if process.zero_terminal_snr else ""
        return f"Stable Diffusion {version}{inpainting}, predicts {process.prediction}{zero}, {self.size} pixels"


@contextmanager
def understood(source: str) -> Iterator[None]:
    """ValueError with the source in front, where settings or shapes that were read make no network."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ZeroDivisionError, RuntimeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{source}: what was read makes no network that is known ({reason})") from None


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError when it is damaged or none."""
    if file.suffix == ".ckpt":
        raise ValueError(f"{file} is a pickle, which can hold code: `python scripts/convert.py` makes it a safe file")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}); fetch it again") from None


def network_of(
    cls: Any,
    config: Any,
    tensors: dict[str, Tensor],
    rename_of: Callable[[Any], Rename],
    source: str,
    **buffers: Tensor,
) -> Any:
    """A frozen network with these tensors, and with buffers that are ours alone."""
    with understood(source), torch.device("meta"):
        network = cls(config)
    if isinstance(config, UNetConfig) and min(config.widths) < NARROW:
        raise ValueError(f"{source}: levels narrower than {NARROW} channels have other norm groups there than here")
    own = {name: tensor for name, tensor in network.state_dict().items() if name not in buffers}
    return fill(network, {**buffers, **checked(tensors, own, rename_of(config), source)})


def vae_of(
    config: VAEConfig,
    tensors: dict[str, Tensor],
    rename_of: Callable[[Any], Rename],
    source: str,
    *,
    scale: float,
    shift: float = 0.0,
) -> VAE:
    """A frozen VAE whose latents are standardized by one factor, and one shift, for all channels."""
    mean, std = (torch.full((config.latent_channels,), value) for value in (shift, 1 / scale))
    return network_of(VAE, config, tensors, rename_of, source, latent_mean=mean, latent_std=std)


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


def text_encoder(
    tensors: dict[str, Tensor], config: TextConfig, source: str, *, quick_gelu: bool, heads: int | None = None
) -> TextEncoder:
    """A frozen tower of these tensors, under our names; its sizes are seen from shapes, heads are 64 wide if not given.

    ValueError: tensors that are missing, extra, misshapen or not finite.
    """
    hidden = "transformer.resblocks.0.mlp.c_fc.weight"
    vocabulary = tensors["token_embedding.weight"].shape[0] if "token_embedding.weight" in tensors else VOCABULARY
    if vocabulary < VOCABULARY:
        raise ValueError(f"{source}: knows {vocabulary:,} tokens; only CLIP's own {VOCABULARY:,} can be read")
    needed = ("positional_embedding", "token_embedding.weight", "text_projection", hidden)
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"{source}: a text tower's tensors are missing: {', '.join(missing)}")
    with understood(source), torch.device("meta"):
        length, width = tensors["positional_embedding"].shape
        text = {
            "context_length": length,
            "vocab_size": tensors["token_embedding.weight"].shape[0],
            "width": width,
            "heads": heads or max(width // HEAD, 1),
            "layers": counted(tensors, "transformer.resblocks"),
            "mlp_ratio": tensors[hidden].shape[0] / width,
        }
        embed_dim = tensors["text_projection"].shape[1]
        tower = TextTower({"embed_dim": embed_dim, "quick_gelu": quick_gelu, "text_cfg": text})
    fill(tower, checked(tensors, tower.state_dict(), str, source))
    return TextEncoder(tower, make_tokenizer(length), config, source=CONVERTED, weights=Path(config.model))


def counted(tensors: dict[str, Tensor], prefix: str, *, start: int = 0) -> int:
    """How many numbers from `start` on follow `prefix.`."""
    found = {
        int(name[len(prefix) + 1 :].split(".")[0]) for name in tensors if re.match(rf"{re.escape(prefix)}\.\d", name)
    }
    return sum(number >= start for number in found)


# What all formats of the family have in common for a tower, and for the two of Stable Diffusion XL.
ONE: dict[str, Any] = {"normalize": True, "pooled": False, "zero_empty": False}
FIRST: dict[str, Any] = {"layer": "penultimate", "normalize": False, "pooled": False}
SECOND: dict[str, Any] = FIRST | {"pooled": True}


def in_the_way(parts: Parts) -> list[str]:
    """Settings that no format of the Stable Diffusion family can hold."""
    unet, joined = parts.unet.config, isinstance(parts.text, JoinedEncoder)
    settings = {
        "unet.patch": unet.patch > 1,
        "unet.coordinates": unet.coordinates,
        "unet.vector_width": unet.vector_width > 0 and not joined,
        "unet.size_width": (unet.size_width > 0) != joined,
        "unet.channels (norm groups of narrow levels are others)": min(unet.widths) < NARROW,
        "vae.patch": parts.vae.config.patch > 1,
        "process.path": parts.process.config.path not in ("scaled_linear", "linear"),
        "process.prediction": parts.process.config.prediction == "flow",
    }
    found = [name for name, stands in settings.items() if stands]
    kinds = (("text", FIRST), ("second_text", SECOND)) if joined else (("text", ONE),)
    for encoder, (name, fixed) in zip(parts.text.encoders, kinds, strict=True):
        found += [f"{name}.padding"] if encoder.config.padding is None else []
        found += [f"{name}.{key}" for key, value in fixed.items() if getattr(encoder.config, key) != value]
    return found


def check_foldable(parts: Parts, target: str, *more: str) -> None:
    """ValueError names the settings that stand in the way of writing these parts, and `more` of this target."""
    wrong = [*in_the_way(parts), *more]
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
