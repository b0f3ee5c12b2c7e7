"""Folders of diffusers' pipelines of the Stable Diffusion family: read and written."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.interop import key_map
from ldm.interop.components import (
    CLIP_VOCABULARY,
    NUM_GROUPS,
    SDXL_TEXT_1,
    SDXL_TEXT_2,
    ExportComponents,
    ModelComponents,
    build_frozen,
    channel_mult,
    check_exportable,
    fold_latent_stats,
    latent_buffers,
    read_file,
    text_encoder,
    unsupported_config_errors,
)
from ldm.io.atomic import write_tensors, write_text
from ldm.text import DualTextEncoder, TextConfig, TextEncoder
from ldm.text.tokenizer import Tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.unet.model import NUM_SIZE_CONDS
from ldm.vae import VAE, VAEConfig

KINDS = re.compile(r"StableDiffusion(XL)?(Img2Img|Inpaint)?Pipeline")
WEIGHTS, PYTORCH = "diffusion_pytorch_model", {"format": "pt"}
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
PADDING = {"<|endoftext|>": 49407, "!": 0}
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's names and CLIP's
ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # of text towers, and whether it is the quick one
# Settings that our networks have no other value of, which is also the default of a file without them.
UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "class_embed_type": None,
    "encoder_hid_dim": None,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "time_cond_proj_dim": None,
    "addition_embed_type_num_heads": 64,
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
UNET_BLOCKS = {f"{kind}{way}Block2D" for kind in ("", "CrossAttn") for way in ("Down", "Up")}
VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "latents_mean": None,
    "latents_std": None,
}
SCHEDULER_FIXED: dict[str, Any] = {"num_train_timesteps": 1000, "trained_betas": None}
TEXT_FIXED: dict[str, Any] = {"layer_norm_eps": 1e-5}


def is_folder(path: Path) -> bool:
    """Whether diffusers wrote this folder."""
    return (path / "model_index.json").is_file()


# Reading.


def read(folder: Path) -> ModelComponents:
    """The components of a Stable Diffusion 1, 2 or XL pipeline; ValueError names what is missing or not supported."""
    index = _read_json(folder / "model_index.json")
    kind = KINDS.fullmatch(str(index.get("_class_name")))
    if not kind:
        raise ValueError(
            f"{folder} holds a {index.get('_class_name')}: only StableDiffusionPipeline and "
            "StableDiffusionXLPipeline, also for inpainting, are supported"
        )
    unet, vae = _read_unet(folder), _read_vae(folder)
    diffusion = Diffusion(_diffusion_config(folder / "scheduler/scheduler_config.json"))
    path = folder / "unet/config.json"
    with unsupported_config_errors(str(path)):
        resolution = int(_read_json(path)["sample_size"]) * vae.config.factor
    if not kind[1]:
        return ModelComponents(unet, diffusion, vae, _read_text(folder, ""), resolution)
    empty = {"zero_empty_prompt": index.get("force_zeros_for_empty_prompt", True)}
    first, second = _read_text(folder, "", **SDXL_TEXT_1, **empty), _read_text(folder, "_2", **SDXL_TEXT_2, **empty)
    return ModelComponents(unet, diffusion, vae, DualTextEncoder(first, second), resolution)


def _read_vae(folder: Path) -> VAE:
    """The VAE, standardized by its scaling factor."""
    path = folder / "vae/config.json"
    values, config = _read_json(path), _vae_config(path)
    with unsupported_config_errors(str(path)):
        scale, shift = float(values.get("scaling_factor", 0.18215)), float(values.get("shift_factor") or 0.0)
    if not (0 < scale < math.inf and math.isfinite(shift)):
        raise ValueError(f"{path}: scaling_factor is {scale}, expected a number above 0")
    tensors, buffers = (
        _read_tensors(folder / "vae", WEIGHTS),
        latent_buffers(config.latent_channels, scale=scale, shift=shift),
    )
    rename = key_map.vae_key_to_diffusers(config)
    return build_frozen(
        partial(VAE, config), key_map.rename_legacy_vae_keys(tensors), rename, f"{folder}/vae", **buffers
    )


def _read_unet(folder: Path) -> UNet:
    config, tensors = _unet_config(folder / "unet/config.json"), _read_tensors(folder / "unet", WEIGHTS)
    return build_frozen(partial(UNet, config), tensors, key_map.unet_key_to_diffusers, f"{folder}/unet")


def _read_text(folder: Path, suffix: str, **settings: Any) -> TextEncoder:
    """The frozen tower of text_encoder{suffix}/, which pads prompts as tokenizer{suffix}/ does."""
    where = folder / f"text_encoder{suffix}"
    values = _read_json(where / "config.json")
    _check_fixed(values, TEXT_FIXED, where / "config.json")
    _check_tokenizer(folder / f"tokenizer{suffix}")
    pad_token_id = _pad_token_id(folder / f"tokenizer{suffix}")
    with unsupported_config_errors(str(where)):
        tensors = key_map.text_from_transformers(_read_tensors(where, "model"))
        heads = values["num_attention_heads"]
    activation = str(values.get("hidden_act", "quick_gelu"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: hidden_act is {activation!r}, only {' and '.join(ACTIVATIONS)} are supported")
    config = TextConfig(model=str(folder), pad_token_id=pad_token_id, **settings)
    return text_encoder(tensors, config, str(where), quick_gelu=ACTIVATIONS[activation], heads=heads)


def _pad_token_id(folder: Path) -> int:
    """The token that prompts are padded with; as in transformers, the map of special tokens has the last word."""
    values = _read_json(folder / "tokenizer_config.json")
    if (folder / "special_tokens_map.json").is_file():
        values |= _read_json(folder / "special_tokens_map.json")
    pad = values.get("pad_token", "<|endoftext|>")
    pad = str(pad.get("content") if isinstance(pad, dict) else pad)
    if pad not in PADDING:
        raise ValueError(f"{folder}: pad_token is {pad!r}, only {' and '.join(PADDING)} are supported")
    return PADDING[pad]


def _check_tokenizer(folder: Path) -> None:
    """ValueError unless a tokenizer has CLIP's tokens, if it lists them; it may have more."""
    if (folder / "vocab.json").is_file():
        vocabulary = _read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").is_file():
        with unsupported_config_errors(str(folder)):
            vocabulary = dict(_read_json(folder / "tokenizer.json")["model"]["vocab"])
    else:
        return
    known = _clip_vocabulary(Tokenizer(77))
    if not known.items() <= vocabulary.items():
        raise ValueError(f"{folder}: {len(vocabulary):,} tokens of another vocabulary; {CLIP_VOCABULARY}")


def _clip_vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of all tokens as transformers names them."""
    return {SPECIAL.get(token, token): index for token, index in tokenizer.encoder.items()}


def _unet_config(path: Path) -> UNetConfig:
    """Our configuration of a U-Net from its config.json."""
    values = _read_json(path)
    _check_fixed(values, UNET_FIXED, path)
    if unknown := {*values.get("down_block_types", ()), *values.get("up_block_types", ())} - UNET_BLOCKS:
        raise ValueError(f"{path}: blocks of type {', '.join(sorted(map(str, unknown)))} are not supported")
    if values.get("addition_embed_type") not in (None, "text_time"):
        raise ValueError(f"{path}: addition_embed_type {values['addition_embed_type']} is not supported")
    with unsupported_config_errors(str(path)):
        widths = values["block_out_channels"]
        depths = _per_level(values.get("transformer_layers_per_block", 1), len(widths))
        crossed = ["CrossAttn" in name for name in values["down_block_types"]]
        heads = values.get("num_attention_heads") or values["attention_head_dim"]  # the latter is a misnomer there
        size_embed_dim = (values.get("addition_embed_type") and values["addition_time_embed_dim"]) or 0
        return UNetConfig(
            in_channels=values["out_channels"],
            cond_channels=values["in_channels"] - values["out_channels"],
            model_channels=widths[0],
            channel_mult=channel_mult(widths),
            num_res_blocks=values.get("layers_per_block", 2),
            transformer_depth=tuple(depth if cross else 0 for depth, cross in zip(depths, crossed, strict=True)),
            mid_transformer_depth=depths[-1],
            num_heads=tuple(_per_level(heads, len(widths))),
            context_dim=values["cross_attention_dim"],
            pooled_dim=(values.get("projection_class_embeddings_input_dim") or 0) - NUM_SIZE_CONDS * size_embed_dim,
            size_embed_dim=size_embed_dim,
            scale_shift_norm=values.get("resnet_time_scale_shift", "default") == "scale_shift",
            norm_num_groups=values.get("norm_num_groups", NUM_GROUPS),
        )


def _vae_config(path: Path) -> VAEConfig:
    """Our configuration of a VAE from its config.json."""
    values = _read_json(path)
    _check_fixed(values, VAE_FIXED, path)
    with unsupported_config_errors(str(path)):
        widths = values["block_out_channels"]
        return VAEConfig(
            image_channels=values["in_channels"],
            base_channels=widths[0],
            channel_mult=channel_mult(widths),
            num_res_blocks=values["layers_per_block"],
            mid_attention=values.get("mid_block_add_attention", True),
            latent_channels=values["latent_channels"],
            norm_num_groups=values.get("norm_num_groups", NUM_GROUPS),
        )


def _diffusion_config(path: Path) -> DiffusionConfig:
    """Our configuration of the diffusion from a scheduler's."""
    values = _read_json(path)
    _check_fixed(values, SCHEDULER_FIXED, path)
    schedule, betas = values.get("beta_schedule"), (values.get("beta_start"), values.get("beta_end"))
    if BETAS.get(str(schedule)) != betas:
        raise ValueError(f"{path}: {schedule} betas from {betas[0]} to {betas[1]}, only {BETAS} are supported")
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    prediction = str(values.get("prediction_type", "epsilon"))
    if prediction not in predictions:
        raise ValueError(f"{path}: prediction_type is {prediction!r}, only {', '.join(predictions)} are supported")
    zero = values.get("rescale_betas_zero_snr", False)
    config = {"noise_schedule": schedule, "prediction": predictions[prediction], "zero_terminal_snr": zero}
    return DiffusionConfig.from_dict(config, source=str(path))


def _read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a component: one file or several by an index, in float32 or as the fp16 variant."""
    for variant in ("", ".fp16"):
        index = folder / f"{stem}.safetensors.index{variant}.json"
        files = [folder / f"{stem}{variant}.safetensors"]
        if index.is_file():
            files = [folder / Path(name).name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        if all(file.is_file() for file in files):
            return {name: tensor for file in files for name, tensor in read_file(file).items()}
    raise ValueError(f"{folder} has no {stem}.safetensors: download the safetensors files of the model, too")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the diffusers folder is incomplete, download it again")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: download it again") from None


def _check_fixed(values: dict[str, Any], fixed: dict[str, Any], path: Path) -> None:
    for name, supported in fixed.items():
        if values.get(name, supported) != supported:
            raise ValueError(f"{path}: {name} is {values[name]!r}, only {supported!r} is supported")


def _per_level(value: int | list[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


# Writing.


def write(components: ModelComponents, folder: Path) -> None:
    """Write a folder that diffusers' from_pretrained loads; ValueError when it cannot hold the model."""
    parts = check_exportable(components, "a diffusers folder", _unsupported)
    unet, vae = parts.unet, parts.vae
    scale = _vae_scale(vae)
    _write_json(folder / "model_index.json", _index(parts))
    _write_component(folder / "unet", _unet_values(parts), unet.state_dict(), key_map.unet_key_to_diffusers)
    vae_tensors, rename = fold_latent_stats(vae, scale=scale), key_map.vae_key_to_diffusers(vae.config)
    _write_component(folder / "vae", _vae_values(parts, scale), vae_tensors, rename)
    _write_json(folder / "scheduler/scheduler_config.json", _scheduler_values(parts.diffusion.config))
    for encoder, suffix in zip(parts.text.encoders, ("", "_2"), strict=False):
        _write_text_encoder(folder / f"text_encoder{suffix}", encoder, is_xl=parts.is_xl)
        _write_tokenizer(folder / f"tokenizer{suffix}", encoder)


def _unsupported(parts: ExportComponents) -> list[str]:
    """Settings that this format alone cannot hold."""
    unet, towers = parts.unet.config, [encoder.config for encoder in parts.text.encoders]
    settings = {
        "unet.mid_transformer_depth": unet.mid_transformer_depth != max(unet.transformer_depth[-1], 1),
        "text.zero_empty_prompt (differs between the towers)": len({tower.zero_empty_prompt for tower in towers}) > 1,
        "text.pad_token_id": any(tower.pad_token_id not in (None, *PADDING.values()) for tower in towers),
    }
    return [name for name, unsupported in settings.items() if unsupported]


def _index(parts: ExportComponents) -> dict[str, Any]:
    """model_index.json: the class of each component."""
    xl, inpainting = "XL" if parts.is_xl else "", "Inpaint" if parts.unet.config.cond_channels else ""
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{xl}{inpainting}Pipeline",
        "_diffusers_version": "0.30.0",
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "feature_extractor": (None, None),
    }
    if not parts.is_xl:
        return index | {"safety_checker": (None, None), "requires_safety_checker": False}
    return index | {
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "force_zeros_for_empty_prompt": parts.text.encoders[0].config.zero_empty_prompt,
        "image_encoder": (None, None),
    }


def _unet_values(parts: ExportComponents) -> dict[str, Any]:
    config = parts.unet.config
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.transformer_depth]
    values = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": parts.resolution // parts.vae.config.factor,
        "in_channels": config.in_channels + config.cond_channels,
        "out_channels": config.in_channels,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "transformer_layers_per_block": [max(depth, 1) for depth in config.transformer_depth],
        "attention_head_dim": config.num_heads,
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": True,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "norm_num_groups": min(config.norm_groups.values()),  # all are equal, or it is not exported
    }
    if not parts.is_xl:
        return values
    return values | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": config.size_embed_dim,
        "projection_class_embeddings_input_dim": config.pooled_dim + NUM_SIZE_CONDS * config.size_embed_dim,
    }


def _vae_scale(vae: VAE) -> float:
    """The factor of standardized latents; 1, with all statistics in the weights, where channels have their own."""
    alike = bool((vae.latent_std == vae.latent_std[0]).all() and not vae.latent_mean.any())
    return 1 / vae.latent_std[0].item() if alike else 1.0


def _vae_values(parts: ExportComponents, scale: float) -> dict[str, Any]:
    config, levels = parts.vae.config, len(parts.vae.config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": scale,
        "sample_size": parts.resolution,
    }


def _scheduler_values(config: DiffusionConfig) -> dict[str, Any]:
    beta_start, beta_end = BETAS[config.noise_schedule]
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": config.noise_schedule,
        "prediction_type": PREDICTIONS[config.prediction],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "beta_start": beta_start,
        "beta_end": beta_end,
    }


def _write_text_encoder(folder: Path, text: TextEncoder, *, is_xl: bool) -> None:
    """A tower; in version 2 the penultimate layer is the last one of a model that ends with it."""
    tower, projected = text.tower, text.config.use_pooled
    layers = len(tower.blocks) - (text.config.layer == "penultimate" and not is_xl)
    values = {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "projection_dim": tower.text_projection.shape[1],
        "model_type": "clip_text_model",
        "hidden_size": text.width,
        "intermediate_size": tower.blocks[0].mlp["c_fc"].out_features,
        "num_attention_heads": tower.blocks[0].heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": tower.length,
        "vocab_size": tower.token_embedding.num_embeddings,
        "hidden_act": "quick_gelu" if tower.blocks[0].quick_gelu else "gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": text.config.pad_token_id,
    }
    _write_json(folder / "config.json", values)
    tensors = key_map.text_to_transformers(tower.state_dict(), layers, projected=projected)
    write_tensors(folder / "model.safetensors", tensors, PYTORCH)


def _write_tokenizer(folder: Path, text: TextEncoder) -> None:
    """CLIP's vocabulary and merges as transformers reads them."""
    tokenizer = text.tokenizer
    _write_json(folder / "vocab.json", _clip_vocabulary(tokenizer))
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": next(token for token, index in PADDING.items() if index == text.config.pad_token_id),
    }
    _write_json(folder / "special_tokens_map.json", special)
    more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.tower.length}
    _write_json(folder / "tokenizer_config.json", special | more)


def _write_component(folder: Path, values: dict[str, Any], state: dict[str, Tensor], rename: key_map.Rename) -> None:
    _write_json(folder / "config.json", values)
    write_tensors(folder / f"{WEIGHTS}.safetensors", {rename(name): tensor for name, tensor in state.items()}, PYTORCH)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False))
