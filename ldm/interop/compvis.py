"""Single files of Stable Diffusion 1, 2 and XL as CompVis and Stability have them: read by keys and shapes, written."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.interop import family, key_map
from ldm.interop.components import ExportComponents, ModelComponents
from ldm.io.atomic import write_tensors
from ldm.io.tensors import read_tensors
from ldm.text import TextConditioner, TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from ldm.unet.model import NUM_SIZE_CONDS
from ldm.vae import VAE, VAEConfig

UNET, EMA, VAE_PREFIX = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_BIAS_STD = 0.09  # of the bias above: a network over it predicts v, as ComfyUI detects it; nothing else shows that
V_XL, ZERO_XL = "v_pred", "ztsnr"  # empty tensors in files of XL: prediction v, zero terminal SNR
ZERO_EMPTY = {"zero_empty_prompt": True}

Tensors = dict[str, Tensor]


class Tower(NamedTuple):
    """Where a file has a text tower, and what no tensor of it shows."""

    prefix: str
    is_openai: bool  # with the names of transformers and quick GELU; else open_clip's, with its names and GELU
    settings: dict[str, Any]  # of TextConfig


TOWERS = {  # by version
    "1": (Tower("cond_stage_model.transformer.", True, family.SD_TEXT | {"layer": "last", "pad_token_id": 49407}),),
    "2": (Tower("cond_stage_model.model.", False, family.SD_TEXT | {"layer": "penultimate", "pad_token_id": 0}),),
    "XL": (
        Tower("conditioner.embedders.0.transformer.", True, family.SDXL_TEXT_1 | ZERO_EMPTY | {"pad_token_id": 49407}),
        Tower("conditioner.embedders.1.model.", False, family.SDXL_TEXT_2 | ZERO_EMPTY | {"pad_token_id": 0}),
    ),
}
LATENT_SCALES = {"1": 0.18215, "2": 0.18215, "XL": 0.13025}  # from the published configurations
# Matrices here that are 1x1 convolutions there: in the VAE's attention, and in version 1 around the transformers.
VAE_CONV_1X1 = r"mid\.attn_1\.(q|k|v|proj_out)\.weight$"
CONV_1X1 = {"1": rf"{VAE_CONV_1X1}|\.proj_(in|out)\.weight$", "2": VAE_CONV_1X1, "XL": VAE_CONV_1X1}


# Reading.


def read(file: Path, *, ema: bool = False, pickles: bool = False) -> ModelComponents:
    """The components of a Stable Diffusion 1, 2 or XL file, with the averaged weights of the U-Net if asked.

    With `pickles` also a .ckpt, without its code. ValueError: damaged, not Stable Diffusion, see `remap_state_dict`.
    """
    is_pickle = file.suffix == ".ckpt"
    if is_pickle and not pickles:
        raise ValueError(f"{file} is a pickle, which can hold code: convert it with `python scripts/convert.py`")
    return components_from_tensors(_read_pickle(file) if is_pickle else read_tensors(file), file, ema=ema)


def components_from_tensors(tensors: Tensors, file: Path, *, ema: bool = False) -> ModelComponents:
    """The components that the tensors of `file` make."""
    if f"{UNET}input_blocks.0.0.weight" not in tensors or not _strip_prefix(tensors, VAE_PREFIX):
        heads = ", ".join(sorted({name.split(".")[0] for name in tensors})[:5])
        raise ValueError(f"{file} is not a Stable Diffusion file: expected {UNET}* and {VAE_PREFIX}*, got {heads}")
    version, text = _text_from_tensors(tensors, file)
    unet = _unet_from_tensors(tensors, file, version, text.pooled_dim, ema=ema)
    vae = _vae_from_tensors(tensors, file, version)
    diffusion = _detect_diffusion(tensors, version)
    side = 128 if version == "XL" else 96 if diffusion.prediction == "v" else 64  # of latents
    return ModelComponents(unet, Diffusion(diffusion), vae, text, side * vae.config.factor)


def _text_from_tensors(tensors: Tensors, file: Path) -> tuple[str, TextConditioner]:
    """The version of Stable Diffusion and its text towers."""
    for version, towers in TOWERS.items():
        theirs = [_strip_prefix(tensors, tower.prefix) for tower in towers]
        if all(theirs):
            return version, TextConditioner(*(_read_tower(file, *both) for both in zip(towers, theirs, strict=True)))
    expected = " or ".join(" and ".join(f"{tower.prefix}*" for tower in towers) for towers in TOWERS.values())
    raise ValueError(f"{file} has no text tower: expected {expected}")


def _read_tower(file: Path, tower: Tower, tensors: Tensors) -> TextEncoder:
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ("attn_mask", "logit_scale")}
    config = TextConfig(model=str(file), **tower.settings)
    return family.text_encoder(tensors, config, f"{file}: {tower.prefix}", quick_gelu=tower.is_openai)


def _unet_from_tensors(tensors: Tensors, file: Path, version: str, pooled_dim: int, *, ema: bool) -> UNet:
    theirs = _strip_prefix(tensors, UNET)
    if ema:
        names = {name: EMA + name.replace(".", "") for name in theirs}
        if missing := [name for name, averaged in names.items() if averaged not in tensors]:
            raise ValueError(f"{file} has no averaged weights of {len(missing)} tensors, such as {missing[0]}")
        theirs = {name: tensors[averaged] for name, averaged in names.items()}
    where = f"{file}: {UNET}"
    with family.config_errors(where):
        config = _unet_config(theirs, version, pooled_dim)
    return family.build_frozen(UNet, config, theirs, key_map.unet_key_to_compvis(config), where)


def _vae_from_tensors(tensors: Tensors, file: Path, version: str) -> VAE:
    theirs, where = _strip_prefix(tensors, VAE_PREFIX), f"{file}: {VAE_PREFIX}"
    with family.config_errors(where):
        channels, image_channels = theirs["encoder.conv_in.weight"].shape[:2]
        levels = range(family.count_blocks(theirs, "encoder.down"))
        widths = [theirs[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
        config = VAEConfig(
            image_channels=image_channels,
            base_channels=channels,
            channel_mult=family.channel_mult([channels, *widths])[1:],
            num_res_blocks=family.count_blocks(theirs, "encoder.down.0.block"),
            mid_attention="encoder.mid.attn_1.q.weight" in theirs,
            latent_channels=theirs["post_quant_conv.weight"].shape[0],
        )
    buffers = {"latent_mean": 0.0, "latent_std": 1 / LATENT_SCALES[version]}
    return family.build_frozen(VAE, config, theirs, key_map.vae_key_to_compvis(config), where, **buffers)


def _unet_config(tensors: Tensors, version: str, pooled_dim: int) -> UNetConfig:
    """Our configuration of a U-Net, from its shapes and the width of the pooled text that it is conditioned on."""
    channels, in_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    levels: list[list[int]] = [[]]  # indices of the input blocks of each level
    for index in range(1, family.count_blocks(tensors, "input_blocks")):
        if f"input_blocks.{index}.0.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(index)
    widths = [tensors[f"input_blocks.{level[0]}.0.in_layers.2.weight"].shape[0] for level in levels]
    depths = [family.count_blocks(tensors, f"input_blocks.{level[0]}.1.transformer_blocks") for level in levels]
    contexts = [tensor.shape[1] for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")]
    vector_dim = tensors["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in tensors else 0
    out_channels = tensors["out.2.weight"].shape[0] if "out.2.weight" in tensors else in_channels
    return UNetConfig(
        in_channels=out_channels,
        cond_channels=in_channels - out_channels,
        model_channels=channels,
        channel_mult=family.channel_mult([channels, *widths])[1:],
        num_res_blocks=len(levels[0]),
        transformer_depth=tuple(depths),
        mid_transformer_depth=family.count_blocks(tensors, "middle_block.1.transformer_blocks"),
        num_heads=_num_heads(widths, version),
        context_dim=contexts[0] if contexts else 0,
        pooled_dim=pooled_dim,
        size_embed_dim=max(vector_dim - pooled_dim, 0) // NUM_SIZE_CONDS,
    )


def _num_heads(widths: Sequence[int], version: str) -> tuple[int, ...]:
    """Attention heads of each level, which no shape shows: 8 in version 1, else 64 channels each."""
    return tuple(8 if version == "1" else family.num_heads(width) for width in widths)


def _detect_diffusion(tensors: Tensors, version: str) -> DiffusionConfig:
    """What the network was trained with; flags show it in XL, and a bias in version 2."""
    if version == "XL" and V_XL in tensors:
        return DiffusionConfig(prediction="v", zero_terminal_snr=ZERO_XL in tensors)
    bias = tensors.get(UNET + V_BIAS)
    predicts_v = version == "2" and bias is not None and bias.float().std() > V_BIAS_STD
    return DiffusionConfig(prediction="v" if predicts_v else "epsilon")


def _read_pickle(file: Path) -> Tensors:
    """The tensors of a checkpoint of PyTorch Lightning, by a loader that runs no code of the file's."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} cannot be read without running its code ({reason}): use a safetensors file") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    items = state.items() if isinstance(state, dict) else ()
    return {str(name): tensor for name, tensor in items if isinstance(tensor, Tensor)}


def _strip_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Writing.


def write(components: ModelComponents, file: Path) -> None:
    """Write one file; ValueError when the format cannot hold the model."""
    parts = components.to_export("a CompVis file")
    flags = {V_XL: parts.diffusion.config.prediction == "v", ZERO_XL: parts.diffusion.config.zero_terminal_snr}
    unet_name, vae_name = key_map.unet_key_to_compvis(parts.unet.config), key_map.vae_key_to_compvis(parts.vae.config)
    state = {UNET + unet_name(name): tensor for name, tensor in parts.unet.state_dict().items()}
    vae = parts.folded_vae(scale=LATENT_SCALES[parts.version])
    state |= {VAE_PREFIX + vae_name(name): tensor for name, tensor in vae.items()}
    for name in filter(re.compile(CONV_1X1[parts.version]).search, state):
        state[name] = state[name][:, :, None, None]
    state |= _text_tensors(parts)
    state |= {name: torch.tensor([]) for name, is_set in flags.items() if parts.version == "XL" and is_set}
    _check_exportable(parts, state)
    state["alphas_cumprod"] = parts.diffusion.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000).square().float()
    write_tensors(file, state)


def _text_tensors(parts: ExportComponents) -> Tensors:
    state: Tensors = {}
    for tower, encoder in zip(TOWERS[parts.version], parts.text.encoders, strict=True):
        tensors, layers = encoder.tower.state_dict(), len(encoder.tower.blocks)
        if tower.is_openai:
            tensors = key_map.text_to_transformers(tensors, layers)
        elif encoder.config.layer == "last":  # readers take the layer before the last block: append one of zeros
            block, last = "transformer.resblocks.0.", f"transformer.resblocks.{layers}."
            tensors |= {n.replace(block, last): torch.zeros_like(t) for n, t in tensors.items() if n.startswith(block)}
        state |= {tower.prefix + name: tensor for name, tensor in tensors.items()}
    return state


def _check_exportable(parts: ExportComponents, state: Tensors) -> None:
    """ValueError names the settings that no key and no shape of a file shows, where readers assume other ones."""
    unet, version = parts.unet.config, parts.version
    only: dict[str, dict[str, Any]] = {
        "unet": {"scale_shift_norm": False, "num_heads": _num_heads(unet.widths, version)},
        "vae": {"norm_num_groups": family.NUM_GROUPS},
        "diffusion": _detect_diffusion(state, version).inference_fields(),
    }
    others = {f"unet.norm_num_groups (not {family.NUM_GROUPS})": {*unet.norm_groups.values()} != {family.NUM_GROUPS}}
    for name, tower, encoder in zip(("text", "second_text"), TOWERS[version], parts.text.encoders, strict=False):
        only[name] = tower.settings if version != "2" else tower.settings | {"layer": encoder.config.layer}
        block, heads = encoder.tower.blocks[0], family.num_heads(encoder.width)
        others[f"{name}.model (its heads or activation)"] = (block.quick_gelu, block.heads) != (tower.is_openai, heads)
    parts.check(only, others)
