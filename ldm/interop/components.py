"""The components of a pipeline, and what reading and writing the formats of others have in common."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ldm.diffusion.process import Diffusion
from ldm.interop.key_map import Rename, remap_state_dict
from ldm.io.tensors import read_tensors
from ldm.text import DualTextEncoder, TextConditioner, TextConfig, TextEncoder
from ldm.text.config import CONVERTED
from ldm.text.tokenizer import Tokenizer
from ldm.text.tower import TextTower
from ldm.unet import UNet
from ldm.vae import VAE

CLIP_VOCAB_SIZE = 49_408
CLIP_VOCABULARY = (
    f"only CLIP's own, of {CLIP_VOCAB_SIZE:,} tokens, is supported: use CLIP's tokenizer, and a text model with its "
    "vocabulary, of any width and depth"
)
NUM_GROUPS = 32  # of the norms of the Stable Diffusion family
HEAD_DIM = 64  # width of an attention head, where shapes do not show it
# What all formats of the family have in common for a tower, and for the two of Stable Diffusion XL.
SD_TEXT: dict[str, Any] = {"final_layer_norm": True, "use_pooled": False, "zero_empty_prompt": False}
SDXL_TEXT_1: dict[str, Any] = {"layer": "penultimate", "final_layer_norm": False, "use_pooled": False}
SDXL_TEXT_2: dict[str, Any] = SDXL_TEXT_1 | {"use_pooled": True}

Network = TypeVar("Network", bound=nn.Module)


class ModelComponents(NamedTuple):
    """What a pipeline is made of."""

    unet: UNet
    diffusion: Diffusion
    vae: VAE | None  # None: diffusion in pixels
    text: TextConditioner | None  # None: unconditional
    resolution: int  # side of the training images, in pixels
    vocabulary: Sequence[str] = ()  # words of the training captions; empty: unknown
    metadata: Mapping[str, Any] = MappingProxyType({})  # of a training here: data, guidance scale; empty: unknown

    @property
    def description(self) -> str:
        """What kind of model this is, in words."""
        if self.vae is None or self.text is None or self.metadata:
            return "a model of ldm"
        quick_gelu = self.text.encoders[0].tower.blocks[0].quick_gelu
        version = "XL" if isinstance(self.text, DualTextEncoder) else "1" if quick_gelu else "2"
        inpainting = " for inpainting" if self.unet.config.cond_channels else ""
        zero = " at zero terminal SNR" if self.diffusion.config.zero_terminal_snr else ""
        prediction = self.diffusion.config.prediction
        return f"Stable Diffusion {version}{inpainting}, predicts {prediction}{zero}, {self.resolution} pixels"


class ExportComponents(NamedTuple):
    """Components that another format can hold."""

    unet: UNet
    diffusion: Diffusion
    vae: VAE
    text: TextConditioner
    resolution: int

    @property
    def is_xl(self) -> bool:
        """Whether this is a model like Stable Diffusion XL, with two towers."""
        return isinstance(self.text, DualTextEncoder)


# Reading.


@contextmanager
def unsupported_config_errors(where: str) -> Iterator[None]:
    """ValueError that begins with `where`, for settings or shapes that do not make a network."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ZeroDivisionError, RuntimeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{where}: unsupported architecture ({reason})") from None


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError when it is damaged or another kind of file."""
    if file.suffix == ".ckpt":
        raise ValueError(f"{file} is a pickle, which can hold code: convert it with `python scripts/convert.py`")
    return read_tensors(file)


def channel_mult(widths: Sequence[int]) -> tuple[int, ...]:
    """Widths of levels as multiples of the first; ValueError where they are not."""
    if any(width % widths[0] for width in widths):
        raise ValueError(f"the widths {tuple(widths)} are not multiples of the first")
    return tuple(width // widths[0] for width in widths)


def count_blocks(tensors: Mapping[str, Tensor], prefix: str, *, start: int = 0) -> int:
    """How many indices from `start` on follow `prefix.`."""
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)", name) for name in tensors)
    return sum(index >= start for index in {int(match[1]) for match in matches if match})


def build_frozen(
    make: Callable[[], Network], tensors: dict[str, Tensor], rename: Rename, where: str, **buffers: Tensor
) -> Network:
    """A frozen network in float32 with these tensors, which `rename` maps our names to, and with buffers of our own."""
    with unsupported_config_errors(where), torch.device("meta"):
        network = make()
    ours = {name: tensor for name, tensor in network.state_dict().items() if name not in buffers}
    try:
        tensors = remap_state_dict(tensors, ours, rename)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    network.load_state_dict({name: tensor.float() for name, tensor in (buffers | tensors).items()}, assign=True)
    return network.requires_grad_(False).eval()


def latent_buffers(channels: int, *, scale: float, shift: float = 0.0) -> dict[str, Tensor]:
    """Buffers of a VAE whose latents are standardized by one factor, and one shift, for all channels."""
    return {"latent_mean": torch.full((channels,), shift), "latent_std": torch.full((channels,), 1 / scale)}


def text_encoder(
    tensors: dict[str, Tensor], config: TextConfig, where: str, *, quick_gelu: bool, heads: int | None = None
) -> TextEncoder:
    """A frozen tower of tensors under our names; its sizes come from shapes, heads are 64 wide if not given.

    ValueError: another vocabulary than CLIP's; tensors that are missing, extra, misshapen or not finite.
    """
    hidden = "transformer.resblocks.0.mlp.c_fc.weight"
    needed = ("token_embedding.weight", "positional_embedding", "text_projection", hidden)
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"{where}: tensors of a text tower are missing: {', '.join(missing)}")
    with unsupported_config_errors(where):
        (vocab_size, width), (length, _) = (
            tensors["token_embedding.weight"].shape,
            tensors["positional_embedding"].shape,
        )
        text_cfg = {
            "context_length": length,
            "vocab_size": vocab_size,
            "width": width,
            "heads": heads or max(width // HEAD_DIM, 1),
            "layers": count_blocks(tensors, "transformer.resblocks"),
            "mlp_ratio": tensors[hidden].shape[0] / width,
        }
        cfg = {"embed_dim": tensors["text_projection"].shape[1], "quick_gelu": quick_gelu, "text_cfg": text_cfg}
    if vocab_size < CLIP_VOCAB_SIZE:
        raise ValueError(f"{where}: a vocabulary of {vocab_size:,} tokens; {CLIP_VOCABULARY}")
    tower = build_frozen(lambda: TextTower(cfg), tensors, str, where)
    return TextEncoder(tower, Tokenizer(length), config, model_id=CONVERTED, weights=Path(config.model))


# Writing.


def check_exportable(
    components: ModelComponents, target: str, unsupported: Callable[[ExportComponents], list[str]]
) -> ExportComponents:
    """ValueError unless `target` can hold a model; `unsupported` lists the settings that this target alone cannot."""
    unet, diffusion, vae, text, resolution, *_ = components
    if vae is None or text is None:
        lacks = "VAE" if vae is None else "text tower"
        raise ValueError(f"cannot export to {target}: the model has no {lacks}; only a model folder of ldm can hold it")
    parts = ExportComponents(unet, diffusion, vae, text, resolution)
    if settings := [*unsupported_settings(parts), *unsupported(parts)]:
        raise ValueError(f"cannot export to {target}: unsupported settings {', '.join(settings)}")
    return parts


def unsupported_settings(parts: ExportComponents) -> list[str]:
    """Settings that no format of the Stable Diffusion family can hold."""
    unet, vae, diffusion = parts.unet.config, parts.vae.config, parts.diffusion.config
    settings = {
        "unet.patch_size": unet.patch_size > 1,
        "unet.coord_conv": unet.coord_conv,
        "unet.pooled_dim": unet.pooled_dim > 0 and not parts.is_xl,
        "unet.size_embed_dim": (unet.size_embed_dim > 0) != parts.is_xl,
        "unet.norm_min_group_channels": len({*unet.norm_groups.values()}) > 1,
        "vae.patch_size": vae.patch_size > 1,
        "diffusion.noise_schedule": diffusion.noise_schedule not in ("scaled_linear", "linear"),
        "diffusion.prediction": diffusion.prediction == "flow",
    }
    towers = {"text": SDXL_TEXT_1, "second_text": SDXL_TEXT_2} if parts.is_xl else {"text": SD_TEXT}
    for encoder, (name, fixed) in zip(parts.text.encoders, towers.items(), strict=True):
        settings[f"{name}.pad_token_id"] = encoder.config.pad_token_id is None
        settings |= {f"{name}.{key}": getattr(encoder.config, key) != value for key, value in fixed.items()}
    return [name for name, unsupported in settings.items() if unsupported]


def fold_latent_stats(vae: VAE, *, scale: float) -> dict[str, Tensor]:
    """The VAE's tensors, with its latent statistics folded into the two 1x1 convolutions so that `scale` remains."""
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
