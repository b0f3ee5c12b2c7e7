"""What the formats of the Stable Diffusion family have in common, and how their tensors become networks."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.interop import key_map
from ldm.text import TextConfig, TextEncoder
from ldm.text.tower import TextTower
from ldm.text.weights import CONVERTED
from ldm.vae import VAE, VAEConfig

log = logging.getLogger(__name__)

CLIP_VOCAB_SIZE = 49_408
NUM_GROUPS = 32  # of all norms
HEAD_DIM = 64  # width of an attention head, where shapes do not show it
# Settings that all formats have for a text tower, and for the two of Stable Diffusion XL.
SD_TEXT: dict[str, Any] = {"final_layer_norm": True, "use_pooled": False, "zero_empty_prompt": False}
SDXL_TEXT_1: dict[str, Any] = {"layer": "penultimate", "final_layer_norm": False, "use_pooled": False}
SDXL_TEXT_2: dict[str, Any] = SDXL_TEXT_1 | {"use_pooled": True}

Network = TypeVar("Network", bound=nn.Module)


@contextmanager
def config_errors(where: object) -> Iterator[None]:
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


def count_blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many indices follow `prefix.`."""
    matches = (re.match(rf"{re.escape(prefix)}\.(\d+)", name) for name in tensors)
    return len({match[1] for match in matches if match})


def num_heads(width: int) -> int:
    """Attention heads of a layer whose shapes do not show them."""
    return max(width // HEAD_DIM, 1)


def build_frozen(
    cls: Callable[[Any], Network],
    config: Any,
    tensors: Mapping[str, Tensor],
    rename: key_map.Rename,
    where: object,
    **buffers: float,
) -> Network:
    """A frozen float32 network with these tensors, and buffers of one number each; ValueError: `remap_state_dict`."""
    with config_errors(where), torch.device("meta"):
        network = cls(config)
    ours = network.state_dict()
    filled = {name: torch.full(ours.pop(name).shape, value) for name, value in buffers.items()}
    tensors = filled | key_map.remap_state_dict(tensors, ours, rename, where)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network.requires_grad_(False).eval()


def latent_scale(values: Mapping[str, Any]) -> tuple[float, float]:
    """Scale and shift of the latents, in the config.json of an AutoencoderKL; ValueError where they are none."""
    scale, shift = float(values.get("scaling_factor", 0.18215)), float(values.get("shift_factor") or 0.0)
    if not (0 < scale < math.inf and math.isfinite(shift)):
        raise ValueError(f"scaling_factor is {scale}, expected a number above 0; shift_factor is {shift}")
    return scale, shift


def build_vae(
    config: VAEConfig,
    tensors: Mapping[str, Tensor],
    rename: key_map.Rename,
    where: object,
    *,
    scale: float,
    shift: float,
) -> VAE:
    """The frozen VAE of these tensors, whose latents are standardized as (latents - shift) * scale."""
    tensors = key_map.replace_in_names(tensors, key_map.VAE_LEGACY)
    return build_frozen(VAE, config, tensors, rename, where, latent_mean=shift, latent_std=1 / scale)


def text_encoder(
    tensors: Mapping[str, Tensor],
    config: TextConfig,
    where: object,
    *,
    quick_gelu: bool,
    heads: int | None = None,
    learned: Sequence[str] = (),
) -> TextEncoder:
    """A frozen tower of tensors under our names or those of transformers; its sizes come from shapes.

    `learned` are the names of tokens that follow CLIP's own.
    """
    with config_errors(where):
        if config.use_pooled and not {"text_projection", "text_projection.weight"} & tensors.keys():
            raise ValueError("no text_projection, which the pooled embedding needs: use the original file")
        if "token_embedding.weight" not in tensors:
            tensors = key_map.text_from_transformers(tensors)
        vocab_size, width = tensors["token_embedding.weight"].shape
        if vocab_size < CLIP_VOCAB_SIZE:
            raise ValueError(f"a vocabulary of {vocab_size:,} tokens: use CLIP's tokenizer, of {CLIP_VOCAB_SIZE:,}")
        if (unnamed := vocab_size - CLIP_VOCAB_SIZE - len(learned)) < 0:
            raise ValueError(f"{vocab_size:,} embeddings, but the tokenizer has {-unnamed} more: save both together")
        text_cfg: dict[str, Any] = {
            "context_length": tensors["positional_embedding"].shape[0],
            "vocab_size": vocab_size,
            "width": width,
            "heads": heads or num_heads(width),
            "layers": count_blocks(tensors, "transformer.resblocks"),
            "mlp_ratio": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        }
        if learned:
            text_cfg["tokenizer_kwargs"] = {"additional_special_tokens": list(learned)}
        if "text_projection" not in tensors:  # of the pooled embedding alone
            tensors = {**tensors, "text_projection": torch.eye(width)}
        cfg = {"embed_dim": tensors["text_projection"].shape[1], "quick_gelu": quick_gelu, "text_cfg": text_cfg}
    if unnamed:
        log.warning("%s: %d learned tokens have no name in the files, so no prompt can use them", where, unnamed)
    tower = build_frozen(TextTower, cfg, tensors, str, where)
    return TextEncoder(tower, config, model_id=CONVERTED, weights=Path(config.model))
