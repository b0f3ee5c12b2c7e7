"""Single files of CompVis and Stability, Stable Diffusion 1, 2 and XL: read and written.

They have no configuration: what they hold is detected from keys and shapes.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.process import Diffusion, DiffusionConfig, Prediction
from ldm.interop import key_map
from ldm.interop.components import (
    HEAD_DIM,
    NUM_GROUPS,
    SDXL_TEXT_1,
    SDXL_TEXT_2,
    ExportComponents,
    ModelComponents,
    build_frozen,
    channel_mult,
    check_exportable,
    count_blocks,
    fold_latent_stats,
    latent_buffers,
    read_file,
    text_encoder,
    unsupported_config_errors,
)
from ldm.io.atomic import write_tensors
from ldm.text import DualTextEncoder, TextConditioner, TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from ldm.unet.model import NUM_SIZE_CONDS
from ldm.vae import VAE, VAEConfig

UNET, EMA, VAE_PREFIX = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
TEXT1, TEXT2 = "cond_stage_model.transformer.", "cond_stage_model.model."
TEXT_XL1, TEXT_XL2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
TRANSFORMERS_PREFIXES = (TEXT1, TEXT_XL1)  # of OpenAI's towers; the others are open_clip's, and have its names
SCALE, SCALE_XL = 0.18215, 0.13025  # of the latents, from the published configurations
V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_BIAS_STD = 0.09  # of the bias above: a network over it predicts v, as ComfyUI detects it; nothing else shows that
V_XL, ZERO_XL = "v_pred", "ztsnr"  # empty tensors in files of XL: prediction v, zero terminal SNR

Tensors = dict[str, Tensor]


# Reading.


def read(file: Path, *, ema: bool = False, pickles: bool = False) -> ModelComponents:
    """The components of a Stable Diffusion 1, 2 or XL file, with the averaged weights of the U-Net if asked.

    With `pickles` a .ckpt file is read too, its tensors and nothing that runs. ValueError: not a safetensors file, not
    Stable Diffusion, tensors that are missing, extra, misshapen or not finite.
    """
    tensors = _read_pickle(file) if pickles and file.suffix == ".ckpt" else read_file(file)
    return components_from_tensors(tensors, file, ema=ema)


def components_from_tensors(tensors: Tensors, file: Path, *, ema: bool = False) -> ModelComponents:
    """The components that the tensors of `file` make."""
    if f"{UNET}input_blocks.0.0.weight" not in tensors or not _strip_prefix(tensors, VAE_PREFIX):
        heads = ", ".join(sorted({name.split(".")[0] for name in tensors})[:5])
        raise ValueError(f"{file} is not a Stable Diffusion file: expected {UNET}* and {VAE_PREFIX}*, got {heads}")
    text = _text_from_tensors(tensors, file)
    unet = _unet_from_tensors(tensors, file, text.pooled_dim, ema=ema)
    vae = _vae_from_tensors(tensors, file)
    diffusion = _detect_diffusion(tensors)
    side = 128 if _is_xl(tensors) else 96 if diffusion.prediction == "v" else 64  # of latents
    return ModelComponents(unet, Diffusion(diffusion), vae, text, side * vae.config.factor)


def _vae_from_tensors(tensors: Tensors, file: Path) -> VAE:
    """The VAE among the tensors of `file`."""
    where, ours = f"{file}: {VAE_PREFIX}", _strip_prefix(tensors, VAE_PREFIX)
    with unsupported_config_errors(where):
        config = _vae_config(ours)
    buffers = latent_buffers(config.latent_channels, scale=_scale(is_xl=_is_xl(tensors)))
    return build_frozen(partial(VAE, config), ours, key_map.vae_key_to_compvis(config), where, **buffers)


def _text_from_tensors(tensors: Tensors, file: Path) -> TextConditioner:
    """The text tower: transformers' names in version 1, open_clip's in version 2, one of each in XL."""
    if _is_xl(tensors):
        first = _tower(tensors, TEXT_XL1, file, **SDXL_TEXT_1, zero_empty_prompt=True)
        return DualTextEncoder(first, _tower(tensors, TEXT_XL2, file, **SDXL_TEXT_2, zero_empty_prompt=True))
    if _strip_prefix(tensors, TEXT1):
        return _tower(tensors, TEXT1, file, layer="last")
    if _strip_prefix(tensors, TEXT2):
        return _tower(tensors, TEXT2, file, layer="penultimate")
    raise ValueError(f"{file} has no text tower: expected {TEXT1}*, {TEXT2}*, or {TEXT_XL1}* and {TEXT_XL2}*")


def _tower(tensors: Tensors, prefix: str, file: Path, **settings: Any) -> TextEncoder:
    """One tower."""
    theirs, openai = _strip_prefix(tensors, prefix), prefix in TRANSFORMERS_PREFIXES
    with unsupported_config_errors(f"{file}: {prefix}"):
        ours = key_map.text_from_transformers(theirs) if openai else theirs
    ours = {name: tensor for name, tensor in ours.items() if name not in ("attn_mask", "logit_scale")}
    config = TextConfig(model=str(file), pad_token_id=49407 if openai else 0, **settings)
    return text_encoder(ours, config, f"{file}: {prefix}", quick_gelu=openai)


def _unet_from_tensors(tensors: Tensors, file: Path, pooled_dim: int, *, ema: bool) -> UNet:
    where, ours = f"{file}: {UNET}", _strip_prefix(tensors, UNET)
    if ema:
        names = {name: EMA + name.replace(".", "") for name in ours}
        if missing := [name for name, averaged in names.items() if averaged not in tensors]:
            raise ValueError(f"{file} has no averaged weights of {len(missing)} tensors, such as {missing[0]}")
        ours = {name: tensors[averaged] for name, averaged in names.items()}
    with unsupported_config_errors(where):
        config = _unet_config(ours, pooled_dim)
    return build_frozen(partial(UNet, config), ours, key_map.unet_key_to_compvis(config), where)


def _unet_config(tensors: Tensors, pooled_dim: int) -> UNetConfig:
    """Our configuration of a U-Net, from its shapes and the width of the pooled text that it is conditioned on."""
    channels, in_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    levels: list[list[int]] = [[]]  # indices of the input blocks of each level
    for index in range(1, 1 + count_blocks(tensors, "input_blocks", start=1)):
        if f"input_blocks.{index}.0.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(index)
    widths = [tensors[f"input_blocks.{level[0]}.0.in_layers.2.weight"].shape[0] for level in levels]
    depths = [count_blocks(tensors, f"input_blocks.{level[0]}.1.transformer_blocks") for level in levels]
    contexts = [tensor.shape[1] for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")]
    is_sd1 = any(tensor.ndim == 4 for name, tensor in tensors.items() if name.endswith("proj_in.weight"))
    vector_dim = tensors["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in tensors else 0
    out_channels = tensors["out.2.weight"].shape[0] if "out.2.weight" in tensors else in_channels
    return UNetConfig(
        in_channels=out_channels,
        cond_channels=in_channels - out_channels,
        model_channels=channels,
        channel_mult=channel_mult([channels, *widths])[1:],
        num_res_blocks=len(levels[0]),
        transformer_depth=tuple(depths),
        mid_transformer_depth=count_blocks(tensors, "middle_block.1.transformer_blocks"),
        num_heads=_num_heads(widths, is_sd1=is_sd1),
        context_dim=contexts[0] if contexts else 0,
        pooled_dim=pooled_dim,
        size_embed_dim=max(vector_dim - pooled_dim, 0) // NUM_SIZE_CONDS,
    )


def _vae_config(tensors: Tensors) -> VAEConfig:
    """Our configuration of a VAE, from its shapes."""
    channels, image_channels = tensors["encoder.conv_in.weight"].shape[:2]
    levels = range(count_blocks(tensors, "encoder.down"))
    widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
    return VAEConfig(
        image_channels=image_channels,
        base_channels=channels,
        channel_mult=channel_mult([channels, *widths])[1:],
        num_res_blocks=count_blocks(tensors, "encoder.down.0.block"),
        mid_attention="encoder.mid.attn_1.q.weight" in tensors,
        latent_channels=tensors["post_quant_conv.weight"].shape[0],
    )


def _num_heads(widths: list[int] | tuple[int, ...], *, is_sd1: bool) -> tuple[int, ...]:
    """Attention heads of each level, which no shape shows: 8 in version 1, else 64 channels each."""
    return tuple(8 if is_sd1 else max(width // HEAD_DIM, 1) for width in widths)


def _scale(*, is_xl: bool) -> float:
    return SCALE_XL if is_xl else SCALE


def _is_xl(tensors: Tensors) -> bool:
    return bool(_strip_prefix(tensors, TEXT_XL1) and _strip_prefix(tensors, TEXT_XL2))


def _detect_diffusion(tensors: Tensors) -> DiffusionConfig:
    """What the network was trained with; flags show it in XL, and a bias in version 2."""
    if _is_xl(tensors):
        return DiffusionConfig(prediction="v" if V_XL in tensors else "epsilon", zero_terminal_snr=ZERO_XL in tensors)
    return DiffusionConfig(
        prediction=_detect_prediction(tensors.get(UNET + V_BIAS), is_sd1=not _strip_prefix(tensors, TEXT2))
    )


def _detect_prediction(bias: Tensor | None, *, is_sd1: bool) -> Prediction:
    """What a network of version 1 or 2 predicts."""
    return "v" if not is_sd1 and bias is not None and bias.float().std() > V_BIAS_STD else "epsilon"


def _read_pickle(file: Path) -> Tensors:
    """The tensors of a checkpoint of PyTorch Lightning, by a loader that runs no code of the file's."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} cannot be read without running its code ({reason}): find a safetensors file"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)} if isinstance(state, dict) else {}
    wrong = [str(name) for name, tensor in tensors.items() if not isinstance(name, str) or not _is_plain(tensor)]
    if wrong:
        raise ValueError(f"{file}: {len(wrong)} entries are not plain tensors of numbers: {', '.join(wrong[:5])}")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is stored number by number, so that its size is that of what is in the file."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _strip_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Writing.


def write(components: ModelComponents, file: Path) -> None:
    """Write one file; ValueError when the format cannot hold the model."""
    parts = check_exportable(components, "a CompVis file", _unsupported)
    flags = {V_XL: parts.diffusion.config.prediction == "v", ZERO_XL: parts.diffusion.config.zero_terminal_snr}
    state = _unet_tensors(parts) | _vae_tensors(parts) | _text_tensors(parts)
    state |= {name: torch.tensor([]) for name, is_set in flags.items() if parts.is_xl and is_set}
    state["alphas_cumprod"] = parts.diffusion.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000).square().float()
    write_tensors(file, state)


def _unet_tensors(parts: ExportComponents) -> Tensors:
    """In version 1 the matrices around the transformers are 1x1 convolutions."""
    rename, state = key_map.unet_key_to_compvis(parts.unet.config), {}
    for name, tensor in parts.unet.state_dict().items():
        square = _is_sd1(parts) and re.search(r"\.proj_(in|out)\.weight$", name)
        state[UNET + rename(name)] = tensor[:, :, None, None] if square else tensor
    return state


def _vae_tensors(parts: ExportComponents) -> Tensors:
    """The matrices of the attention are 1x1 convolutions."""
    rename, state = key_map.vae_key_to_compvis(parts.vae.config), {}
    for name, tensor in fold_latent_stats(parts.vae, scale=_scale(is_xl=parts.is_xl)).items():
        square = re.search(r"middle\.1\.to_\w+\.weight$", name)
        state[VAE_PREFIX + rename(name)] = tensor[:, :, None, None] if square else tensor
    return state


def _text_tensors(parts: ExportComponents) -> Tensors:
    prefixes = (TEXT_XL1, TEXT_XL2) if parts.is_xl else (TEXT1,) if _is_sd1(parts) else (TEXT2,)
    state: Tensors = {}
    for prefix, encoder in zip(prefixes, parts.text.encoders, strict=True):
        tower, layers = encoder.tower.state_dict(), len(encoder.tower.blocks)
        if prefix in TRANSFORMERS_PREFIXES:
            tower = key_map.text_to_transformers(tower, layers)
        elif encoder.config.layer == "last":  # readers take the layer before the last block: append one of zeros
            block, last = "transformer.resblocks.0.", f"transformer.resblocks.{layers}."
            tower |= {n.replace(block, last): torch.zeros_like(t) for n, t in tower.items() if n.startswith(block)}
        state |= {prefix + name: tensor for name, tensor in tower.items()}
    return state


def _is_sd1(parts: ExportComponents) -> bool:
    """Whether this is a model like Stable Diffusion 1: one tower, of OpenAI's kind."""
    return [encoder.tower.blocks[0].quick_gelu for encoder in parts.text.encoders] == [True]


def _unsupported(parts: ExportComponents) -> list[str]:
    """Settings that no key and no shape of a file shows, and that differ from what readers assume."""
    is_sd1, unet, diffusion = _is_sd1(parts), parts.unet.config, parts.diffusion.config
    rename = key_map.unet_key_to_compvis(unet)
    bias = next((tensor for name, tensor in parts.unet.state_dict().items() if rename(name) == V_BIAS), None)
    detected = _detect_prediction(bias, is_sd1=is_sd1)
    if parts.is_xl:
        detected = "v" if diffusion.prediction == "v" else "epsilon"
    settings = {
        "unet.scale_shift_norm": unet.scale_shift_norm,
        "unet.num_heads": unet.num_heads != _num_heads(unet.widths, is_sd1=is_sd1),
        f"unet.norm_num_groups (not {NUM_GROUPS})": {*unet.norm_groups.values()} != {NUM_GROUPS},
        f"vae.norm_num_groups (not {NUM_GROUPS})": parts.vae.config.norm_num_groups != NUM_GROUPS,
        "diffusion.noise_schedule": diffusion.noise_schedule == "linear",
        "diffusion.prediction (readers detect another one from a bias)": diffusion.prediction != detected,
        "diffusion.zero_terminal_snr": diffusion.zero_terminal_snr and not parts.is_xl,
    }
    for encoder, name in zip(parts.text.encoders, ("text", "second_text"), strict=False):
        openai, block = is_sd1 or (parts.is_xl and name == "text"), encoder.tower.blocks[0]
        config = encoder.config
        settings |= {
            f"{name}.pad_token_id": config.pad_token_id != (49407 if openai else 0),
            f"{name}.zero_empty_prompt": config.zero_empty_prompt != parts.is_xl,
            f"{name}.layer": is_sd1 and config.layer != "last",
            f"{name}.model (its heads or activation)": block.quick_gelu != openai
            or block.heads != max(encoder.width // HEAD_DIM, 1),
        }
    return [name for name, unsupported in settings.items() if unsupported]
