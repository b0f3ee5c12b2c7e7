"""Folders of diffusers' pipelines of the Stable Diffusion family: read and written."""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.interop import key_map
from ldm.interop.components import (
    SDXL_TEXT_1,
    SDXL_TEXT_2,
    ModelComponents,
    build_frozen,
    build_frozen_vae,
    check_exportable,
    fold_latent_stats,
    read_file,
    text_encoder,
    unsupported_config_errors,
)
from ldm.io.atomic import write_tensors, write_text
from ldm.text import DualTextEncoder, TextConfig, TextEncoder
from ldm.unet import UNet, UNetConfig
from ldm.unet.model import NUM_SIZE_CONDS
from ldm.vae import VAEConfig

KINDS = re.compile(r"StableDiffusion(XL)?(Img2Img|Inpaint)?Pipeline")
WEIGHTS, PYTORCH = "diffusion_pytorch_model", {"format": "pt"}
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
PADDING = {"<|endoftext|>": 49407, "!": 0}
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
# Settings that our networks have no other value of, which is also what a file means that leaves them out.
UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "norm_num_groups": 32,
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
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "latents_mean": None,
    "latents_std": None,
}
SCHEDULER_FIXED: dict[str, Any] = {"num_train_timesteps": 1000, "trained_betas": None}
TEXT_FIXED: dict[str, Any] = {"layer_norm_eps": 1e-5}
ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # of text towers, and whether it is the quick one


def is_folder(path: Path) -> bool:
    """Whether diffusers wrote this folder."""
    return (path / "model_index.json").is_file()


def read(folder: Path) -> ModelComponents:
    """The parts of a Stable Diffusion 1, 2 or XL pipeline; ValueError names what is missing or not known here."""
    index = _json(folder / "model_index.json")
    kind = index.get("_class_name")
    found = KINDS.fullmatch(str(kind))
    if not found:
        raise ValueError(
            f"{folder} holds a {kind}; only a StableDiffusionPipeline or a StableDiffusionXLPipeline can be read"
        )
    values = _json(folder / "unet/config.json")
    tensors = _tensors(folder / "unet", WEIGHTS)
    unet = build_frozen(UNet, unet_config(values, folder), tensors, key_map.unet_key_to_diffusers, f"{folder}/unet")
    vae_values = _json(folder / "vae/config.json")
    tensors = key_map.rename_legacy_vae_keys(_tensors(folder / "vae", WEIGHTS))
    of_vae, source = vae_config(vae_values, folder), f"{folder}/vae"
    with unsupported_config_errors(f"{source}/config.json"):
        scale, shift = float(vae_values.get("scaling_factor", 0.18215)), float(vae_values.get("shift_factor") or 0.0)
        1 / scale
    vae = build_frozen_vae(of_vae, tensors, key_map.vae_key_to_diffusers, source, scale=scale, shift=shift)
    process = Diffusion(process_config(_json(folder / "scheduler/scheduler_config.json"), folder))
    with unsupported_config_errors(f"{folder}/unet/config.json"):
        size = int(values["sample_size"]) * vae.config.factor
    if not found[1]:
        return ModelComponents(unet, process, vae, read_text(folder, ""), size)
    empty = {"zero_empty_prompt": index.get("force_zeros_for_empty_prompt", True)}
    text = DualTextEncoder(
        read_text(folder, "", **SDXL_TEXT_1, **empty), read_text(folder, "_2", **SDXL_TEXT_2, **empty)
    )
    return ModelComponents(unet, process, vae, text, size)


def write(parts: ModelComponents, folder: Path) -> None:
    """Write a folder that diffusers' from_pretrained loads; ValueError when it can not hold the model."""
    unet, vae, text = parts.unet, parts.vae, parts.text
    deep = unet.config.mid_transformer_depth == max(unet.config.transformer_depth[-1], 1)
    check_exportable(parts, "a diffusers folder", *([] if deep else ["unet.mid_transformer_depth"]))
    joined, inpaint = isinstance(text, DualTextEncoder), unet.config.cond_channels > 0
    if len({encoder.config.zero_empty_prompt for encoder in text.encoders}) > 1:
        raise ValueError(
            "a diffusers folder can not hold this model: text.zero_empty_prompt differs between the towers"
        )
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' * joined}{'Inpaint' * inpaint}Pipeline",
        "_diffusers_version": "0.30.0",
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "feature_extractor": (None, None),
    }
    if joined:
        index["text_encoder_2"] = ("transformers", "CLIPTextModelWithProjection")
        index["tokenizer_2"] = ("transformers", "CLIPTokenizer")
        index["force_zeros_for_empty_prompt"] = text.encoders[0].config.zero_empty_prompt
        index["image_encoder"] = (None, None)
    else:
        index |= {"safety_checker": (None, None), "requires_safety_checker": False}
    _write_json(folder / "model_index.json", index)
    crossed = [depth > 0 for depth in unet.config.transformer_depth]
    down = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed]
    unet_values = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": parts.size // vae.config.factor,
        "in_channels": unet.config.in_channels + unet.config.cond_channels,
        "out_channels": unet.config.in_channels,
        "block_out_channels": unet.config.widths,
        "layers_per_block": unet.config.num_res_blocks,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "transformer_layers_per_block": [max(depth, 1) for depth in unet.config.transformer_depth],
        "attention_head_dim": unet.config.num_heads,
        "cross_attention_dim": unet.config.context_dim,
        "use_linear_projection": True,
        "resnet_time_scale_shift": "scale_shift" if unet.config.scale_shift_norm else "default",
    }
    if joined:
        unet_values |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": unet.config.size_embed_dim,
            "projection_class_embeddings_input_dim": unet.config.pooled_dim
            + NUM_SIZE_CONDS * unet.config.size_embed_dim,
        }
    _write_part(folder / "unet", unet_values, unet.state_dict(), key_map.unet_key_to_diffusers(unet.config))
    levels = len(vae.config.widths)
    alike = bool((vae.latent_std == vae.latent_std[0]).all() and not vae.latent_mean.any())
    scale = 1 / vae.latent_std[0].item() if alike else 1.0
    vae_values = {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.config.image_channels,
        "out_channels": vae.config.image_channels,
        "latent_channels": vae.config.latent_channels,
        "block_out_channels": vae.config.widths,
        "layers_per_block": vae.config.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "mid_block_add_attention": vae.config.mid_attention,
        "scaling_factor": scale,
        "sample_size": parts.size,
    }
    _write_part(
        folder / "vae", vae_values, fold_latent_stats(vae, scale=scale), key_map.vae_key_to_diffusers(vae.config)
    )
    process = parts.process.config
    betas = dict(zip(("beta_start", "beta_end"), BETAS[process.noise_schedule], strict=True))
    prediction = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[process.prediction]
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": process.noise_schedule,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": process.zero_terminal_snr,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
    _write_json(folder / "scheduler/scheduler_config.json", scheduler | betas)
    for encoder, number in zip(text.encoders, ("", "_2"), strict=False):
        _write_text(folder, number, encoder, joined=joined)


def _write_text(folder: Path, number: str, text: TextEncoder, *, joined: bool) -> None:
    """A tower and its tokenizer; in version 2 the penultimate layer is the last one of a model that ends with it."""
    tower, projected = text.tower, text.config.use_pooled
    layers = len(tower.blocks) - (text.config.layer == "penultimate" and not joined)
    text_values = {
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
    _write_json(folder / f"text_encoder{number}/config.json", text_values)
    tensors = key_map.text_to_transformers(tower.state_dict(), layers, projected=projected)
    write_tensors(folder / f"text_encoder{number}/model.safetensors", tensors, PYTORCH)
    _write_tokenizer(folder / f"tokenizer{number}", text)


def _write_part(folder: Path, values: dict[str, Any], state: dict[str, Tensor], rename: key_map.Rename) -> None:
    _write_json(folder / "config.json", values)
    write_tensors(folder / f"{WEIGHTS}.safetensors", {rename(name): tensor for name, tensor in state.items()}, PYTORCH)


def _write_tokenizer(folder: Path, text: TextEncoder) -> None:
    """CLIP's vocabulary and merges as transformers reads them."""
    tokenizer, padding = text.tokenizer, text.config.pad_token_id
    pad = {number: token for token, number in PADDING.items()}.get(padding or 0)
    if pad is None:
        raise ValueError(f"text.pad_token_id {padding} is not known to diffusers; only {sorted(PADDING.values())} are")
    vocabulary = {SPECIAL.get(token, token): number for token, number in tokenizer.encoder.items()}
    _write_json(folder / "vocab.json", vocabulary)
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.tower.length}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", special | more)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False))


def unet_config(values: dict[str, Any], folder: Path) -> UNetConfig:
    """Our configuration of a U-Net from unet/config.json."""
    _check_fixed(values, UNET_FIXED, folder / "unet/config.json")
    if unknown := {*values.get("down_block_types", ()), *values.get("up_block_types", ())} - UNET_BLOCKS:
        raise ValueError(f"{folder}/unet: blocks of type {', '.join(sorted(map(str, unknown)))} are not known here")
    if values.get("addition_embed_type") not in (None, "text_time"):
        raise ValueError(f"{folder}/unet: addition_embed_type {values['addition_embed_type']} is not known here")
    with unsupported_config_errors(f"{folder}/unet/config.json"):
        widths = values["block_out_channels"]
        levels = len(widths)
        depths = _per_level(values.get("transformer_layers_per_block", 1), levels)
        crossed = ["CrossAttn" in name for name in values["down_block_types"]]
        size_width = (values.get("addition_embed_type") and values["addition_time_embed_dim"]) or 0
        return UNetConfig(
            in_channels=values["out_channels"],
            cond_channels=values["in_channels"] - values["out_channels"],
            model_channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=values.get("layers_per_block", 2),
            transformer_depth=tuple(depth if cross else 0 for depth, cross in zip(depths, crossed, strict=True)),
            mid_transformer_depth=depths[-1],
            num_heads=tuple(_per_level(values.get("num_attention_heads") or values["attention_head_dim"], levels)),
            context_dim=values["cross_attention_dim"],
            pooled_dim=(values.get("projection_class_embeddings_input_dim") or 0) - NUM_SIZE_CONDS * size_width,
            size_embed_dim=size_width,
            scale_shift_norm=values.get("resnet_time_scale_shift", "default") == "scale_shift",
        )


def vae_config(values: dict[str, Any], folder: Path) -> VAEConfig:
    """Our configuration of a VAE from vae/config.json."""
    _check_fixed(values, VAE_FIXED, folder / "vae/config.json")
    with unsupported_config_errors(f"{folder}/vae/config.json"):
        widths = values["block_out_channels"]
        return VAEConfig(
            image_channels=values["in_channels"],
            base_channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=values["layers_per_block"],
            mid_attention=values.get("mid_block_add_attention", True),
            latent_channels=values["latent_channels"],
        )


def process_config(values: dict[str, Any], folder: Path) -> DiffusionConfig:
    """Our configuration of the process from a scheduler's."""
    _check_fixed(values, SCHEDULER_FIXED, folder / "scheduler/scheduler_config.json")
    path = values.get("beta_schedule")
    if path not in BETAS or (values.get("beta_start"), values.get("beta_end")) != BETAS[path]:
        raise ValueError(f"{folder}/scheduler: betas of {path} from {values.get('beta_start')} are not known here")
    known = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    prediction = known.get(values.get("prediction_type", "epsilon"))
    if prediction is None:
        raise ValueError(f"{folder}/scheduler: prediction_type {values['prediction_type']} is not known here")
    zero = values.get("rescale_betas_zero_snr", False)
    config = {"noise_schedule": path, "prediction": prediction, "zero_terminal_snr": zero}
    return DiffusionConfig.from_dict(config, source=f"{folder}/scheduler")


def read_text(folder: Path, number: str, **settings: Any) -> TextEncoder:
    """The frozen tower of text_encoder{number}/, which fills prompts up as tokenizer{number}/ says."""
    values = _json(folder / f"text_encoder{number}/config.json")
    _check_fixed(values, TEXT_FIXED, folder / f"text_encoder{number}/config.json")
    tensors = _tensors(folder / f"text_encoder{number}", "model")
    pad, padding = _padding(folder / f"tokenizer{number}")
    if padding is None:
        known = " and ".join(PADDING)
        raise ValueError(f"{folder}/tokenizer{number} fills prompts with {pad!r}; only {known} are known here")
    source = f"{folder}/text_encoder{number}"
    with unsupported_config_errors(source):
        own, heads = key_map.text_from_transformers(tensors), values["num_attention_heads"]
    quick_gelu = ACTIVATIONS.get(values.get("hidden_act", "quick_gelu"))
    if quick_gelu is None:
        raise ValueError(f"{source}: hidden_act {values['hidden_act']} is not known here")
    config = TextConfig(model=str(folder), pad_token_id=padding, **settings)
    return text_encoder(own, config, source, quick_gelu=quick_gelu, heads=heads)


def _padding(folder: Path) -> tuple[str, int | None]:
    """The token that fills prompts up, and its number: as transformers, the map of special tokens has the last word."""
    told = _json(folder / "tokenizer_config.json")
    if (folder / "special_tokens_map.json").is_file():
        told |= _json(folder / "special_tokens_map.json")
    pad = told.get("pad_token", "<|endoftext|>")
    pad = str(pad.get("content") if isinstance(pad, dict) else pad)
    return pad, PADDING.get(pad)


def _tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a component: one file or several by an index, in float32 or as the fp16 variant."""
    for variant in ("", ".fp16"):
        index = folder / f"{stem}.safetensors.index{variant}.json"
        files = [folder / f"{stem}{variant}.safetensors"]
        if index.is_file():
            files = [folder / Path(name).name for name in sorted(set(_json(index)["weight_map"].values()))]
        if all(file.is_file() for file in files):
            return {name: tensor for file in files for name, tensor in read_file(file).items()}
    raise ValueError(f"{folder} has no {stem}.safetensors: fetch the one that its page offers as safetensors")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the diffusers folder is not whole")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: fetch it again") from None


def _check_fixed(values: dict[str, Any], fixed: dict[str, Any], path: Path) -> None:
    for name, known in fixed.items():
        if values.get(name, known) != known:
            raise ValueError(f"{path}: {name} is {values[name]!r}; only {known!r} is known here")


def _per_level(value: int | list[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)
