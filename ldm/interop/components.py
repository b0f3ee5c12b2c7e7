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
from ldm.text import TextConditioner, TextConfig, TextEncoder
from ldm.text.tokenizer import Tokenizer
from ldm.text.tower import TextTower
from ldm.text.weights import CONVERTED
from ldm.unet import UNet
from ldm.vae import VAE

CLIP_VOCAB_SIZE = 49_408
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
        inpainting = " for inpainting" if self.unet.config.cond_channels else ""
        config = self.diffusion.config
        predicts = f"predicts {config.prediction}{' at zero terminal SNR' if config.zero_terminal_snr else ''}"
        return f"Stable Diffusion {sd_version(self.text)}{inpainting}, {predicts}, {self.resolution} pixels"


def sd_version(text: TextConditioner) -> str:
    """Of Stable Diffusion 1, 2 or XL, the one whose text towers these are like."""
    if len(text.encoders) == 2:
        return "XL"
    return "1" if text.encoders[0].tower.blocks[0].quick_gelu else "2"


# Reading.


@contextmanager
def unsupported_config_errors(where: object) -> Iterator[None]:
    """ValueError that begins with `where`, for settings or shapes that do not make a network."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ZeroDivisionError, RuntimeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: unsupported configuration ({' '.join(reason.split())[:300]})") from None


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
    make: Callable[[], Network], tensors: Mapping[str, Tensor], rename: Rename, where: str, **buffers: Tensor
) -> Network:
    """A frozen network in float32 with these tensors, which `rename` maps our names to, and with buffers of our own."""
    with unsupported_config_errors(where), torch.device("meta"):
        network = make()
    ours = {name: tensor for name, tensor in network.state_dict().items() if name not in buffers}
    tensors = buffers | remap_state_dict(tensors, ours, rename, where)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network.requires_grad_(False).eval()


def latent_buffers(channels: int, *, scale: float, shift: float = 0.0) -> dict[str, Tensor]:
    """Buffers of a VAE whose latents are standardized by one factor, and one shift, for all channels."""
    return {"latent_mean": torch.full((channels,), shift), "latent_std": torch.full((channels,), 1 / scale)}


def text_encoder(
    tensors: Mapping[str, Tensor], config: TextConfig, where: str, *, quick_gelu: bool, heads: int | None = None
) -> TextEncoder:
    """A frozen tower of tensors under our names; its sizes come from shapes, heads are 64 wide if not given.

    ValueError: another vocabulary than CLIP's; tensors that are missing, extra, misshapen or not finite.
    """
    with unsupported_config_errors(where):
        vocab_size, width = tensors["token_embedding.weight"].shape
        length = tensors["positional_embedding"].shape[0]
        text_cfg = {
            "context_length": length,
            "vocab_size": vocab_size,
            "width": width,
            "heads": heads or max(width // HEAD_DIM, 1),
            "layers": count_blocks(tensors, "transformer.resblocks"),
            "mlp_ratio": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        }
        cfg = {"embed_dim": tensors["text_projection"].shape[1], "quick_gelu": quick_gelu, "text_cfg": text_cfg}
        if vocab_size < CLIP_VOCAB_SIZE:
            raise ValueError(
                f"a vocabulary of {vocab_size:,} tokens: use CLIP's tokenizer and {CLIP_VOCAB_SIZE:,} tokens"
            )
    tower = build_frozen(lambda: TextTower(cfg), tensors, str, where)
    return TextEncoder(tower, Tokenizer(length), config, model_id=CONVERTED, weights=Path(config.model))


# Writing.


class ExportComponents(NamedTuple):
    """Components that another format can hold."""

    unet: UNet
    diffusion: Diffusion
    vae: VAE
    text: TextConditioner
    resolution: int
    version: str  # 1, 2 or XL


def export_components(components: ModelComponents, target: str) -> ExportComponents:
    """The components without what only a model folder of ldm has; ValueError where `target` needs more."""
    unet, diffusion, vae, text, resolution, *_ = components
    if vae is None or text is None:
        lacks = "VAE" if vae is None else "text tower"
        raise ValueError(f"cannot export to {target}: the model has no {lacks}; only a model folder of ldm can hold it")
    return ExportComponents(unet, diffusion, vae, text, resolution, sd_version(text))


def check_exportable(
    parts: ExportComponents, target: str, only: Mapping[str, Mapping[str, Any]], others: Mapping[str, bool]
) -> None:
    """ValueError names the settings that `target` cannot hold.

    `only` has, by part and setting, the one value that it can hold; `others` has settings, and whether they differ.
    """
    unet, is_xl = parts.unet.config, parts.version == "XL"
    configs: dict[str, Any] = {"unet": unet, "vae": parts.vae.config, "diffusion": parts.diffusion.config}
    configs |= zip(("text", "second_text"), (encoder.config for encoder in parts.text.encoders), strict=False)
    family: dict[str, dict[str, Any]] = {  # what no format of it has another value of
        "unet": {"patch_size": 1, "coord_conv": False} | ({} if is_xl else {"pooled_dim": 0, "size_embed_dim": 0}),
        "vae": {"patch_size": 1},
    }
    wrong = [
        f"{part}.{name} {getattr(config, name)} (only {value})"
        for part, config in configs.items()
        for name, value in {**family.get(part, {}), **only.get(part, {})}.items()
        if getattr(config, name) != value
    ]
    others = {
        "unet.size_embed_dim 0": is_xl and not unet.size_embed_dim,
        "unet.norm_min_group_channels": len({*unet.norm_groups.values()}) > 1,
        **others,
    }
    wrong += [name for name, differs in others.items() if differs]
    if wrong:
        raise ValueError(f"cannot export to {target}: unsupported settings {', '.join(wrong)}")


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
