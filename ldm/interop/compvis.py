"""Single files of CompVis and Stability, Stable Diffusion 1, 2 and XL: read and written.

What they hold is seen from keys and shapes.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.process import Diffusion, DiffusionConfig, Prediction
from ldm.interop import key_map
from ldm.interop.components import (
    HEAD_DIM,
    SDXL_TEXT_1,
    SDXL_TEXT_2,
    ModelComponents,
    build_frozen,
    build_frozen_vae,
    check_exportable,
    count_blocks,
    fold_latent_stats,
    read_file,
    text_encoder,
    unsupported_config_errors,
)
from ldm.io.atomic import write_tensors
from ldm.text import DualTextEncoder, Text, TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from ldm.unet.model import NUM_SIZE_CONDS
from ldm.vae import VAEConfig

UNET, EMA, VAE_PREFIX = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
TEXT1, TEXT2 = "cond_stage_model.transformer.", "cond_stage_model.model."
TEXT_XL1, TEXT_XL2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SCALE, SCALE_XL = 0.18215, 0.13025  # of the latents, in no file: the configuration beside it has it
V_SPREAD = 0.09  # of the bias below, above which ComfyUI takes a network for one that predicts v; nothing else shows it
V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_XL, ZERO_XL = "v_pred", "ztsnr"  # tensors that stand in files of XL for a prediction of v, and for zero terminal SNR

Tensors = dict[str, Tensor]


def read(file: Path, *, ema: bool = False, pickles: bool = False) -> ModelComponents:
    """The parts of a Stable Diffusion 1, 2 or XL file, with the averaged weights of the U-Net if asked.

    With `pickles` a .ckpt file is read too, its tensors and nothing that runs.
    ValueError: no safetensors file, none of the known kinds, tensors that are missing, extra, misshapen or not finite.
    """
    return components_from_tensors(
        _read_pickle(file) if pickles and file.suffix == ".ckpt" else read_file(file), file, ema=ema
    )


def components_from_tensors(tensors: Tensors, file: Path, *, ema: bool = False) -> ModelComponents:
    """The parts that the tensors of `file` make."""
    unet_tensors = _strip_prefix(tensors, UNET)
    if "input_blocks.0.0.weight" not in unet_tensors or not _strip_prefix(tensors, VAE_PREFIX):
        found = ", ".join(sorted({name.split(".")[0] for name in tensors})[:5])
        raise ValueError(f"{file} is no Stable Diffusion file: it has {found}, not {UNET}* and {VAE_PREFIX}*")
    if ema:
        averaged = {name: tensors.get(EMA + name.replace(".", "")) for name in unet_tensors}
        if missing := [name for name, tensor in averaged.items() if tensor is None]:
            raise ValueError(f"{file} has no averaged weights of {len(missing)} tensors, such as {missing[0]}")
        unet_tensors = {name: tensor for name, tensor in averaged.items() if tensor is not None}
    text = read_text(tensors, file)
    vae_tensors = _strip_prefix(tensors, VAE_PREFIX)
    with unsupported_config_errors(f"{file}: {UNET}"):
        config = unet_config(unet_tensors, text.pooled_dim)
    with unsupported_config_errors(f"{file}: {VAE_PREFIX}"):
        of_vae = vae_config(vae_tensors)
    unet = build_frozen(UNet, config, unet_tensors, key_map.unet_key_to_compvis, f"{file}: {UNET}")
    joined = isinstance(text, DualTextEncoder)
    scale, source = SCALE_XL if joined else SCALE, f"{file}: {VAE_PREFIX}"
    vae = build_frozen_vae(of_vae, vae_tensors, key_map.vae_key_to_compvis, source, scale=scale)
    prediction = _detect_prediction(unet_tensors.get(V_BIAS), first=not _strip_prefix(tensors, TEXT2))
    prediction = "v" if joined and V_XL in tensors else prediction
    process = DiffusionConfig(prediction=prediction, zero_terminal_snr=joined and ZERO_XL in tensors)
    size = vae.config.factor * (128 if joined else 96 if prediction == "v" else 64)
    return ModelComponents(unet, Diffusion(process), vae, text, size)


def write(parts: ModelComponents, file: Path) -> None:
    """Write one file; ValueError when the format can not hold the model."""
    check_exportable(parts, "a CompVis file", *_unsupported(parts))
    joined, first, process = isinstance(parts.text, DualTextEncoder), _is_sd1(parts), parts.process.config
    state = {}
    rename = key_map.unet_key_to_compvis(parts.unet.config)
    for name, tensor in parts.unet.state_dict().items():
        square = first and re.search(r"\.proj_(in|out)\.weight$", name)
        state[UNET + rename(name)] = tensor[:, :, None, None] if square else tensor
    rename = key_map.vae_key_to_compvis(parts.vae.config)
    for name, tensor in fold_latent_stats(parts.vae, scale=SCALE_XL if joined else SCALE).items():
        square = re.search(r"middle\.1\.to_\w+\.weight$", name)
        state[VAE_PREFIX + rename(name)] = tensor[:, :, None, None] if square else tensor
    prefixes = (TEXT_XL1, TEXT_XL2) if joined else (TEXT1,) if first else (TEXT2,)
    for prefix, encoder in zip(prefixes, parts.text.encoders, strict=True):
        tower, layers = encoder.tower.state_dict(), len(encoder.tower.blocks)
        if prefix in (TEXT1, TEXT_XL1):
            tower = key_map.text_to_transformers(tower, layers)
        elif encoder.config.layer == "last":  # theirs is read before its last block, which is then never used
            block, last = "transformer.resblocks.0.", f"transformer.resblocks.{layers}."
            unused = {n.replace(block, last): torch.zeros_like(t) for n, t in tower.items() if n.startswith(block)}
            tower |= unused
        state |= {prefix + name: tensor for name, tensor in tower.items()}
    state |= {name: torch.tensor([]) for name, told in _xl_flags(process).items() if joined and told}
    state["alphas_cumprod"] = parts.process.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000).square().float()
    write_tensors(file, state)


def _is_sd1(parts: ModelComponents) -> bool:
    """Whether this is a model as Stable Diffusion 1: one tower, of OpenAI's kind."""
    return [encoder.tower.blocks[0].quick_gelu for encoder in parts.text.encoders] == [True]


def _unsupported(parts: ModelComponents) -> list[str]:
    """Settings that no key and no shape of a file tells, and that are not those which are taken for granted."""
    joined, first = isinstance(parts.text, DualTextEncoder), _is_sd1(parts)
    unet, process = parts.unet.config, parts.process.config
    bias = {key_map.unet_key_to_compvis(unet)(name): tensor for name, tensor in parts.unet.state_dict().items()}.get(
        V_BIAS
    )
    seen = "v" if process.prediction == "v" and joined else _detect_prediction(bias, first=first or joined)
    settings = {
        "unet.scale_shift_norm": unet.scale_shift_norm,
        "unet.num_heads": unet.num_heads != tuple(8 if first else max(width // HEAD_DIM, 1) for width in unet.widths),
        "diffusion.noise_schedule": process.noise_schedule == "linear",
        "diffusion.prediction (which is seen there from the spread of one bias)": process.prediction != seen,
        "diffusion.zero_terminal_snr": process.zero_terminal_snr and not joined,
    }
    found = [name for name, stands in settings.items() if stands]
    for number, (encoder, name) in enumerate(zip(parts.text.encoders, ("text", "second_text"), strict=False)):
        openai, tower = first or (joined and number == 0), encoder.tower
        wanted = {
            "pad_token_id": 49407 if openai else 0,
            "zero_empty_prompt": joined,
            **({"layer": "last"} if first else {}),
        }
        found += [f"{name}.{key}" for key, value in wanted.items() if getattr(encoder.config, key) != value]
        if tower.blocks[0].quick_gelu != openai or tower.blocks[0].heads != max(encoder.width // HEAD_DIM, 1):
            found.append(f"{name}.model (its heads or activation)")
    return found


def _detect_prediction(bias: Tensor | None, *, first: bool) -> Prediction:
    """What a network of the kind of Stable Diffusion 2 predicts."""
    return "v" if not first and bias is not None and bias.float().std() > V_SPREAD else "epsilon"


def unet_config(tensors: Tensors, pooled_width: int = 0) -> UNetConfig:
    """Our configuration of a U-Net, from its shapes and the width of the pooled text that it is told."""
    channels, in_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    levels: list[list[int]] = [[]]  # numbers of the input blocks of each level
    for number in range(1, 1 + count_blocks(tensors, "input_blocks", start=1)):
        if f"input_blocks.{number}.0.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(number)
    widths = [tensors[f"input_blocks.{level[0]}.0.in_layers.2.weight"].shape[0] for level in levels]
    depths = [count_blocks(tensors, f"input_blocks.{level[0]}.1.transformer_blocks") for level in levels]
    crossed = [tensor for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")]
    square = any(tensor.ndim == 4 for name, tensor in tensors.items() if name.endswith("proj_in.weight"))
    told = tensors["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in tensors else 0
    out_channels = tensors["out.2.weight"].shape[0] if "out.2.weight" in tensors else in_channels
    return UNetConfig(
        in_channels=out_channels,
        cond_channels=in_channels - out_channels,
        model_channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=len(levels[0]),
        transformer_depth=tuple(depths),
        mid_transformer_depth=count_blocks(tensors, "middle_block.1.transformer_blocks"),
        num_heads=tuple(8 if square else max(width // HEAD_DIM, 1) for width in widths),
        context_dim=crossed[0].shape[1] if crossed else 0,
        pooled_dim=pooled_width,
        size_embed_dim=max(told - pooled_width, 0) // NUM_SIZE_CONDS,
    )


def vae_config(tensors: Tensors) -> VAEConfig:
    """Our configuration of a VAE, from its shapes."""
    channels, image_channels = tensors["encoder.conv_in.weight"].shape[:2]
    widths = [
        tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0]
        for level in range(count_blocks(tensors, "encoder.down"))
    ]
    return VAEConfig(
        image_channels=image_channels,
        base_channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=count_blocks(tensors, "encoder.down.0.block"),
        mid_attention="encoder.mid.attn_1.q.weight" in tensors,
        latent_channels=tensors["post_quant_conv.weight"].shape[0],
    )


def read_text(tensors: Tensors, file: Path) -> Text:
    """The text tower: transformers' names in version 1, open_clip's in version 2, one of each in XL."""
    if _strip_prefix(tensors, TEXT1):
        return _tower(tensors, TEXT1, file, layer="last")
    if _strip_prefix(tensors, TEXT2):
        return _tower(tensors, TEXT2, file, layer="penultimate")
    if _strip_prefix(tensors, TEXT_XL1) and _strip_prefix(tensors, TEXT_XL2):
        first = _tower(tensors, TEXT_XL1, file, **SDXL_TEXT_1, zero_empty=True)
        return DualTextEncoder(first, _tower(tensors, TEXT_XL2, file, **SDXL_TEXT_2, zero_empty=True))
    raise ValueError(f"{file} has no text tower: neither {TEXT1}*, {TEXT2}*, nor {TEXT_XL1}* with {TEXT_XL2}*")


def _tower(tensors: Tensors, prefix: str, file: Path, **settings: Any) -> TextEncoder:
    """One tower. Those under transformers' names are OpenAI's, the others open_clip's."""
    theirs, openai = _strip_prefix(tensors, prefix), prefix in (TEXT1, TEXT_XL1)
    with unsupported_config_errors(f"{file}: {prefix}"):
        own = key_map.text_from_transformers(theirs) if openai else theirs
    own = {name: tensor for name, tensor in own.items() if name not in ("attn_mask", "logit_scale")}
    config = TextConfig(model=str(file), pad_token_id=49407 if openai else 0, **settings)
    return text_encoder(own, config, f"{file}: {prefix}", quick_gelu=openai)


def _xl_flags(process: DiffusionConfig) -> dict[str, bool]:
    """Names of empty tensors that tell what a file of XL is, and whether they do."""
    return {V_XL: process.prediction == "v", ZERO_XL: process.zero_terminal_snr}


def _read_pickle(file: Path) -> Tensors:
    """The tensors of a checkpoint of PyTorch Lightning, by a loader that runs no code of the file's."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} can not be read without running code of it ({reason}); find a safetensors file"
        ) from None
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = state if isinstance(state, dict) else {}
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    wrong = [str(name) for name, tensor in tensors.items() if not isinstance(name, str) or not _plain(tensor)]
    if wrong:
        raise ValueError(f"{file}: {len(wrong)} entries are no plain tensors of numbers: {', '.join(wrong[:5])}")
    return tensors


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is stored number by number, so that its size is that of what is in the file."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _strip_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
