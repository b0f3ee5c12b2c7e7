"""Single files of Stable Diffusion 1, 2 and XL as CompVis and Stability have them: read by keys and shapes, written."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.interop import family, key_map, kinds
from ldm.interop.components import ExportComponents, ModelComponents, check_vae, folded_vae
from ldm.io.atomic import write_tensors
from ldm.io.model_dir import read_json
from ldm.io.tensors import read_tensors
from ldm.text import TextConditioner, TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from ldm.unet.model import NUM_SIZE_CONDS
from ldm.vae import VAE, VAEConfig

log = logging.getLogger(__name__)

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
VIT_H_BLOCKS = 24  # of the text tower of version 2
LATENT_SCALES = {"1": 0.18215, "2": 0.18215, "XL": 0.13025}  # from the published configurations
LATENT_CHANNELS = 4  # of all of them
VAE_PREFIXES = (VAE_PREFIX, "vae.", "")
XL_TOWERS = "conditioner.embedders."
MID_ATTENTIONS = ("encoder.mid.attn_1.", "encoder.mid_block.attentions.")
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Matrices here that are 1x1 convolutions there: in the VAE's attention, and in version 1 around the transformers.
VAE_CONV_1X1 = r"mid\.attn_1\.(q|k|v|proj_out)\.weight$"
CONV_1X1 = {"1": rf"{VAE_CONV_1X1}|\.proj_(in|out)\.weight$", "2": VAE_CONV_1X1, "XL": VAE_CONV_1X1}


# Reading.


def read(file: Path, *, ema: bool = False, pickles: bool = False) -> ModelComponents:
    """The components of a Stable Diffusion 1, 2 or XL file, with the averaged weights of the U-Net if asked.

    With `pickles` also a .ckpt, without its code. ValueError: damaged, not Stable Diffusion, see `remap_state_dict`.
    """
    return components_from_tensors(read_tensors(file, pickles=pickles), file, ema=ema)


def read_vae(file: Path) -> VAE:
    """The VAE of a file, also a pickle: a VAE alone under the names of CompVis or of diffusers, or a whole model."""
    return vae_from_tensors(read_tensors(file, pickles=True), file)


def components_from_tensors(tensors: Tensors, file: Path, *, ema: bool = False) -> ModelComponents:
    """The components that the tensors of `file` make."""
    kinds.check_kind(tensors, file)
    if f"{UNET}input_blocks.0.0.weight" not in tensors or not _strip_prefix(tensors, VAE_PREFIX):
        if part := kinds.name_part(tensors):
            raise ValueError(f"{file} is {part}: {kinds.READABLE}")
        heads = ", ".join(sorted({name.split(".")[0] for name in tensors})[:5])
        raise ValueError(f"{file} is not a Stable Diffusion file: expected {UNET}* and {VAE_PREFIX}*, got {heads}")
    version, text = _text_from_tensors(tensors, file)
    unet = _unet_from_tensors(tensors, file, version, text.pooled_dim, ema=ema)
    vae = _build_vae(tensors, VAE_PREFIX, file, LATENT_SCALES[version])
    diffusion = _detect_diffusion(tensors, version)
    side = 128 if version == "XL" else 96 if diffusion.prediction == "v" else 64  # of latents
    return ModelComponents(unet, Diffusion(diffusion), vae, text, side * vae.config.factor)


def is_vae(tensors: Tensors) -> bool:
    """Whether these are the tensors of a VAE alone."""
    return _vae_prefix(tensors) is not None and not any(name.startswith(UNET) for name in tensors)


def vae_from_tensors(tensors: Tensors, file: Path) -> VAE:
    """The VAE that the tensors of `file` make, whatever else it holds; ValueError: none, or of unknown scale."""
    prefix = _vae_prefix(tensors)
    if prefix is None:
        kinds.check_kind(tensors, file)
        raise ValueError(f"{file} has no VAE: expected {VAE_PREFIX}{kinds.VAE_MARK}, or the same without the prefix")
    scale, shift = _latent_scale(tensors, prefix, file)
    return _build_vae(tensors, prefix, file, scale, shift=shift)


def _latent_scale(tensors: Tensors, prefix: str, file: Path) -> tuple[float, float]:
    """Scale and shift of the latents, which a whole model tells, or a file beside; ValueError where nothing does."""
    if f"{UNET}input_blocks.0.0.weight" in tensors:
        return LATENT_SCALES["XL" if any(name.startswith(XL_TOWERS) for name in tensors) else "1"], 0.0
    if (channels := tensors[prefix + kinds.VAE_MARK].shape[1]) != LATENT_CHANNELS:
        remedy = "pass the folder vae/ of diffusers, whose config.json has it"
        raise ValueError(f"{file}: the scale of latents of {channels} channels is not in the file: {remedy}")
    beside = file.with_name("config.json")  # as in the folder of a published VAE
    if beside.is_file():
        with family.config_errors(beside):
            return family.latent_scale(read_json(beside))
    taken = f"{LATENT_SCALES['1']} of Stable Diffusion 1 and 2 is taken; a folder vae/ of diffusers tells it"
    log.warning("%s does not tell the scale of its latents: %s", file.name, taken)
    return LATENT_SCALES["1"], 0.0


def _vae_prefix(tensors: Tensors) -> str | None:
    return next((prefix for prefix in VAE_PREFIXES if prefix + kinds.VAE_MARK in tensors), None)


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
    settings = tower.settings
    if not tower.is_openai and not settings["use_pooled"] and _ends_early(tensors):
        log.warning("%s: its text tower ends before the last, unused block, so its last layer is taken", file)
        settings = settings | {"layer": "last"}
    config = TextConfig(model=str(file), **settings)
    return family.text_encoder(tensors, config, f"{file}: {tower.prefix}", quick_gelu=tower.is_openai)


def _ends_early(tensors: Tensors) -> bool:
    """Whether an open_clip tower lacks its last block, on which only the pooled embedding depends.

    Files that were made of diffusers folders do, and their projection is missing or was filled in; of ViT-H/14, the
    blocks are counted. The last block is not one that `write` has appended, of zeros.
    """
    count = family.count_blocks(tensors, "transformer.resblocks")
    if count in (VIT_H_BLOCKS - 1, VIT_H_BLOCKS):
        return count < VIT_H_BLOCKS
    last = tensors.get(f"transformer.resblocks.{count - 1}.mlp.c_fc.weight", torch.zeros(1))
    projection = tensors.get("text_projection", torch.eye(1))
    return bool(last.any()) and projection.ndim == 2 and torch.equal(projection.float(), torch.eye(*projection.shape))


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


def _build_vae(tensors: Tensors, prefix: str, file: Path, scale: float, *, shift: float = 0.0) -> VAE:
    """The VAE of the tensors below a prefix, under the names of CompVis or of diffusers."""
    where, own = f"{file}: {prefix}*" if prefix else file, _strip_prefix(tensors, prefix)
    theirs = {name: tensor for name, tensor in own.items() if name.startswith(VAE_PARTS)}
    if left_out := len(own) - len(theirs):  # of its training: losses, a discriminator
        log.warning("%s: %d tensors that are not of the VAE are left out", where, left_out)
    is_compvis = any(name.startswith("encoder.down.") for name in theirs)
    level_name, block_name = ("down", "block") if is_compvis else ("down_blocks", "resnets")
    with family.config_errors(where):
        channels, image_channels = theirs["encoder.conv_in.weight"].shape[:2]
        count = family.count_blocks(theirs, f"encoder.{level_name}")
        levels = [f"encoder.{level_name}.{level}.{block_name}" for level in range(count)]
        widths = [theirs[f"{level}.0.conv1.weight"].shape[0] for level in levels]
        config = VAEConfig(
            image_channels=image_channels,
            base_channels=channels,
            channel_mult=family.channel_mult([channels, *widths])[1:],
            num_res_blocks=family.count_blocks(theirs, levels[0]),
            mid_attention=any(name.startswith(MID_ATTENTIONS) for name in theirs),
            latent_channels=theirs[kinds.VAE_MARK].shape[1],
        )
    rename = key_map.vae_key_to_compvis(config) if is_compvis else key_map.vae_key_to_diffusers
    return family.build_vae(config, theirs, rename, where, scale=scale, shift=shift)


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
    kinds.check_input_channels(in_channels, out_channels)
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


def _strip_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Writing.


def write(components: ModelComponents, file: Path) -> None:
    """Write one file; ValueError when the format cannot hold the model."""
    parts = components.to_export("a CompVis file")
    flags = {V_XL: parts.diffusion.config.prediction == "v", ZERO_XL: parts.diffusion.config.zero_terminal_snr}
    unet_name, vae_name = key_map.unet_key_to_compvis(parts.unet.config), key_map.vae_key_to_compvis(parts.vae.config)
    state = {UNET + unet_name(name): tensor for name, tensor in parts.unet.state_dict().items()}
    vae = folded_vae(parts.vae, scale=LATENT_SCALES[parts.version])
    state |= {VAE_PREFIX + vae_name(name): tensor for name, tensor in vae.items()}
    _make_convs(state, CONV_1X1[parts.version])
    state |= _text_tensors(parts)
    state |= {name: torch.tensor([]) for name, is_set in flags.items() if parts.version == "XL" and is_set}
    _check_exportable(parts, state)
    state["alphas_cumprod"] = parts.diffusion.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000).square().float()
    write_tensors(file, state)


def write_vae(vae: VAE, file: Path) -> None:
    """Write a VAE alone, with the scale of version 1; ValueError when the format cannot hold it."""
    check_vae(vae, "a CompVis file", {"norm_num_groups": family.NUM_GROUPS, "latent_channels": LATENT_CHANNELS})
    rename = key_map.vae_key_to_compvis(vae.config)
    state = {rename(name): tensor for name, tensor in folded_vae(vae, scale=LATENT_SCALES["1"]).items()}
    _make_convs(state, VAE_CONV_1X1)
    write_tensors(file, state)


def _make_convs(state: Tensors, names: str) -> None:
    """Make 1x1 convolutions of the matrices with these names."""
    for name in filter(re.compile(names).search, state):
        state[name] = state[name][:, :, None, None]


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
        others[f"{name}.model (its learned tokens)"] = bool(encoder.tokenizer.learned)
    parts.check(only, others)
