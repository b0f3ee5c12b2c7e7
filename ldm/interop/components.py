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

from ldm.diffusion.process import Diffusion
from ldm.interop.key_map import Rename, remap_state_dict
from ldm.text import DualTextEncoder, Text, TextConfig, TextEncoder
from ldm.text.config import CONVERTED
from ldm.text.tokenizer import make_tokenizer
from ldm.text.tower import TextTower
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

CLIP_VOCAB_SIZE = 49_408  # of CLIP
NARROW = 256  # below, our U-Net has fewer than the 32 norm groups of the family
HEAD_DIM = 64  # width of a head where heads can not be seen from shapes


class ModelComponents(NamedTuple):
    """What a pipeline is made of."""

    unet: UNet
    process: Diffusion
    vae: VAE
    text: Text
    size: int

    @property
    def description(self) -> str:
        """Which member of the family this is, as its text and channels tell."""
        openai = self.text.encoders[0].tower.blocks[0].quick_gelu
        version = "XL" if isinstance(self.text, DualTextEncoder) else "1" if openai else "2"
        inpainting = " for inpainting" if self.unet.config.cond_channels else ""
        process = self.process.config
        zero = " at zero terminal SNR" if process.zero_terminal_snr else ""
        return f"Stable Diffusion {version}{inpainting}, predicts {process.prediction}{zero}, {self.size} pixels"


@contextmanager
def unsupported_config_errors(source: str) -> Iterator[None]:
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


def build_frozen(
    cls: Any,
    config: Any,
    tensors: dict[str, Tensor],
    rename_of: Callable[[Any], Rename],
    source: str,
    **buffers: Tensor,
) -> Any:
    """A frozen network with these tensors, and with buffers that are ours alone."""
    with unsupported_config_errors(source), torch.device("meta"):
        network = cls(config)
    if isinstance(config, UNetConfig) and min(config.widths) < NARROW:
        raise ValueError(f"{source}: levels narrower than {NARROW} channels have other norm groups there than here")
    own = {name: tensor for name, tensor in network.state_dict().items() if name not in buffers}
    return load_frozen_fp32(network, {**buffers, **remap_checked(tensors, own, rename_of(config), source)})


def build_frozen_vae(
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
    return build_frozen(VAE, config, tensors, rename_of, source, latent_mean=mean, latent_std=std)


def remap_checked(tensors: dict[str, Tensor], own: dict[str, Tensor], rename: Rename, source: str) -> dict[str, Tensor]:
    """`renamed`, with the source in front of what is wrong."""
    try:
        return remap_state_dict(tensors, own, rename)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load_frozen_fp32(network: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
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
    vocabulary = tensors["token_embedding.weight"].shape[0] if "token_embedding.weight" in tensors else CLIP_VOCAB_SIZE
    if vocabulary < CLIP_VOCAB_SIZE:
        raise ValueError(f"{source}: knows {vocabulary:,} tokens; only CLIP's own {CLIP_VOCAB_SIZE:,} can be read")
    needed = ("positional_embedding", "token_embedding.weight", "text_projection", hidden)
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"{source}: a text tower's tensors are missing: {', '.join(missing)}")
    with unsupported_config_errors(source), torch.device("meta"):
        length, width = tensors["positional_embedding"].shape
        text = {
            "context_length": length,
            "vocab_size": tensors["token_embedding.weight"].shape[0],
            "width": width,
            "heads": heads or max(width // HEAD_DIM, 1),
            "layers": count_blocks(tensors, "transformer.resblocks"),
            "mlp_ratio": tensors[hidden].shape[0] / width,
        }
        embed_dim = tensors["text_projection"].shape[1]
        tower = TextTower({"embed_dim": embed_dim, "quick_gelu": quick_gelu, "text_cfg": text})
    load_frozen_fp32(tower, remap_checked(tensors, tower.state_dict(), str, source))
    return TextEncoder(tower, make_tokenizer(length), config, model_id=CONVERTED, weights=Path(config.model))


def count_blocks(tensors: dict[str, Tensor], prefix: str, *, start: int = 0) -> int:
    """How many numbers from `start` on follow `prefix.`."""
    found = {
        int(name[len(prefix) + 1 :].split(".")[0]) for name in tensors if re.match(rf"{re.escape(prefix)}\.\d", name)
    }
    return sum(number >= start for number in found)


# What all formats of the family have in common for a tower, and for the two of Stable Diffusion XL.
SD_TEXT: dict[str, Any] = {"final_layer_norm": True, "use_pooled": False, "zero_empty_prompt": False}
SDXL_TEXT_1: dict[str, Any] = {"layer": "penultimate", "final_layer_norm": False, "use_pooled": False}
SDXL_TEXT_2: dict[str, Any] = SDXL_TEXT_1 | {"use_pooled": True}


def unsupported_settings(parts: ModelComponents) -> list[str]:
    """Settings that no format of the Stable Diffusion family can hold."""
    unet, joined = parts.unet.config, isinstance(parts.text, DualTextEncoder)
    settings = {
        "unet.patch_size": unet.patch_size > 1,
        "unet.coord_conv": unet.coord_conv,
        "unet.pooled_dim": unet.pooled_dim > 0 and not joined,
        "unet.size_embed_dim": (unet.size_embed_dim > 0) != joined,
        "unet.model_channels (norm groups of narrow levels are others)": min(unet.widths) < NARROW,
        "vae.patch_size": parts.vae.config.patch_size > 1,
        "diffusion.noise_schedule": parts.process.config.noise_schedule not in ("scaled_linear", "linear"),
        "diffusion.prediction": parts.process.config.prediction == "flow",
    }
    found = [name for name, stands in settings.items() if stands]
    kinds = (("text", SDXL_TEXT_1), ("second_text", SDXL_TEXT_2)) if joined else (("text", SD_TEXT),)
    for encoder, (name, fixed) in zip(parts.text.encoders, kinds, strict=True):
        found += [f"{name}.padding"] if encoder.config.pad_token_id is None else []
        found += [f"{name}.{key}" for key, value in fixed.items() if getattr(encoder.config, key) != value]
    return found


def check_exportable(parts: ModelComponents, target: str, *more: str) -> None:
    """ValueError names the settings that stand in the way of writing these parts, and `more` of this target."""
    wrong = [*unsupported_settings(parts), *more]
    if wrong:
        raise ValueError(f"{target} can not hold this model: {', '.join(wrong)} stand in the way")


def fold_latent_stats(vae: VAE, *, scale: float) -> dict[str, Tensor]:
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
