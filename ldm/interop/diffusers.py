"""Folders of diffusers' pipelines of the Stable Diffusion family: read and written."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.interop import family, key_map, kinds
from ldm.interop.components import ExportComponents, ModelComponents, check_vae, folded_vae
from ldm.io.atomic import write_tensors, write_text
from ldm.io.model_dir import read_json
from ldm.io.tensors import read_tensors
from ldm.text import TextConditioner, TextConfig, TextEncoder
from ldm.text.tokenizer import Tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.unet.model import NUM_SIZE_CONDS
from ldm.vae import VAE, VAEConfig

KINDS = re.compile(r"StableDiffusion(XL)?(Img2Img|Inpaint)?Pipeline")
WEIGHTS, PYTORCH = "diffusion_pytorch_model", {"format": "pt"}
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's names and CLIP's
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
# Their values of a setting, and ours.
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
PADDING = {"<|endoftext|>": 49407, "!": 0}
TOKENIZER_FILES = ("vocab.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
UNET_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # and whether they have transformers
EMBEDS_SIZES = {None: False, "text_time": True}
ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # of text towers, and whether it is the quick one
# Settings that no tensor shows and our networks have no other value of, which is also the default of a file.
UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "class_embed_type": None,
    "norm_eps": 1e-5,
}
VAE_FIXED: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
}
SCHEDULER_FIXED: dict[str, Any] = {"num_train_timesteps": 1000, "trained_betas": None}
TEXT_FIXED: dict[str, Any] = {"layer_norm_eps": 1e-5}


# Reading.


def read(folder: Path, *, pickles: bool = False) -> ModelComponents:
    """The components of a Stable Diffusion 1, 2 or XL pipeline; ValueError names what is missing or not supported.

    With `pickles` also those in .bin files, without their code.
    """
    index = read_json(folder / "model_index.json")
    kind = KINDS.fullmatch(str(index.get("_class_name")))
    if not kind:
        supported = "only StableDiffusionPipeline and StableDiffusionXLPipeline, also for inpainting, are supported"
        raise ValueError(f"{folder} holds a {index.get('_class_name')}: {supported}")
    unet, vae = _read_unet(folder / "unet", pickles), read_vae(folder / "vae", pickles=pickles)
    diffusion = _read_diffusion(folder / "scheduler/scheduler_config.json")
    with _open_config(folder / "unet/config.json", {}) as values:
        resolution = int(values["sample_size"]) * vae.config.factor
    empty = {"zero_empty_prompt": index.get("force_zeros_for_empty_prompt", True)}
    towers = {"": family.SDXL_TEXT_1 | empty, "_2": family.SDXL_TEXT_2 | empty} if kind[1] else {"": {}}
    text = TextConditioner(*(_read_text(folder, suffix, settings, pickles) for suffix, settings in towers.items()))
    return ModelComponents(unet, diffusion, vae, text, resolution)


def _read_unet(folder: Path, pickles: bool) -> UNet:
    with _open_config(folder / "config.json", UNET_FIXED) as values:
        kinds.check_input_channels(values["in_channels"], values["out_channels"])
        widths = values["block_out_channels"]
        depths = _per_level(values.get("transformer_layers_per_block", 1), len(widths))
        crossed = [_translate("down_block_types", name, UNET_BLOCKS) for name in values["down_block_types"]]
        heads = values.get("num_attention_heads") or values["attention_head_dim"]  # the latter is a misnomer there
        has_sizes = _translate("addition_embed_type", values.get("addition_embed_type"), EMBEDS_SIZES)
        size_embed_dim = values["addition_time_embed_dim"] if has_sizes else 0
        config = UNetConfig(
            in_channels=values["out_channels"],
            cond_channels=values["in_channels"] - values["out_channels"],
            model_channels=widths[0],
            channel_mult=family.channel_mult(widths),
            num_res_blocks=values.get("layers_per_block", 2),
            transformer_depth=tuple(depth if cross else 0 for depth, cross in zip(depths, crossed, strict=True)),
            mid_transformer_depth=depths[-1],
            num_heads=tuple(_per_level(heads, len(widths))),
            context_dim=values["cross_attention_dim"],
            pooled_dim=(values.get("projection_class_embeddings_input_dim") or 0) - NUM_SIZE_CONDS * size_embed_dim,
            size_embed_dim=size_embed_dim,
            scale_shift_norm=values.get("resnet_time_scale_shift", "default") == "scale_shift",
            norm_num_groups=values.get("norm_num_groups", family.NUM_GROUPS),
        )
    tensors = _read_tensors(folder, WEIGHTS, WEIGHTS, pickles)
    return family.build_frozen(UNet, config, tensors, key_map.unet_key_to_diffusers, folder)


def read_vae(folder: Path, *, pickles: bool = True) -> VAE:
    """The VAE of a folder with its config.json, standardized by its scaling factor and its shift factor."""
    with _open_config(folder / "config.json", VAE_FIXED) as values:
        widths, latent_channels = values["block_out_channels"], values["latent_channels"]
        config = VAEConfig(
            image_channels=values["in_channels"],
            base_channels=widths[0],
            channel_mult=family.channel_mult(widths),
            num_res_blocks=values["layers_per_block"],
            mid_attention=values.get("mid_block_add_attention", True),
            latent_channels=latent_channels,
            norm_num_groups=values.get("norm_num_groups", family.NUM_GROUPS),
        )
        scale, shift = family.latent_scale(values)
    tensors = _read_tensors(folder, WEIGHTS, WEIGHTS, pickles)
    for name, channels in (("quant_conv", 2 * latent_channels), ("post_quant_conv", latent_channels)):
        if not values.get(f"use_{name}", True):  # Stable Diffusion 3 and Flux have none: the identity
            tensors |= {f"{name}.weight": torch.eye(channels)[..., None, None], f"{name}.bias": torch.zeros(channels)}
    return family.build_vae(config, tensors, key_map.vae_key_to_diffusers, folder, scale=scale, shift=shift)


def _read_diffusion(path: Path) -> Diffusion:
    with _open_config(path, SCHEDULER_FIXED) as values:
        schedule, betas = values.get("beta_schedule"), (values.get("beta_start"), values.get("beta_end"))
        if BETAS.get(str(schedule)) != betas:
            name = values.get("_class_name", "scheduler")
            raise ValueError(f"{name}: {schedule} betas from {betas[0]} to {betas[1]}, only {BETAS} are supported")
        config = DiffusionConfig(
            noise_schedule=schedule,
            prediction=_translate("prediction_type", values.get("prediction_type", "epsilon"), PREDICTIONS),
            zero_terminal_snr=values.get("rescale_betas_zero_snr", False),
        )
    return Diffusion(config)


def _read_text(folder: Path, suffix: str, settings: dict[str, Any], pickles: bool) -> TextEncoder:
    """The frozen tower of text_encoder{suffix}/, which pads prompts as tokenizer{suffix}/ does."""
    where, tokenizer = folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}"
    special = tokenizer / "special_tokens_map.json"  # as in transformers, it has the last word
    with _open_config(tokenizer / "tokenizer_config.json", {}) as values:
        pad = (values | (read_json(special) if special.is_file() else {})).get("pad_token", "<|endoftext|>")
        pad_token_id = _translate("pad_token", pad.get("content") if isinstance(pad, dict) else pad, PADDING)
    tokens = _read_vocabulary(tokenizer)
    with _open_config(where / "config.json", TEXT_FIXED) as values:
        heads = values["num_attention_heads"]
        quick_gelu = _translate("hidden_act", values.get("hidden_act", "quick_gelu"), ACTIVATIONS)
    config = TextConfig(model=str(folder), pad_token_id=pad_token_id, **settings)
    tensors = _read_tensors(where, "model", "pytorch_model", pickles)
    return family.text_encoder(tensors, config, where, quick_gelu=quick_gelu, heads=heads, learned=_learned(tokens))


def _read_vocabulary(folder: Path) -> dict[str, int]:
    """The tokens that the files of a tokenizer list; ValueError where those of CLIP are not among them."""
    files = {name: read_json(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    with family.config_errors(folder):
        own = files.get("tokenizer.json", {})
        tokens = dict(files.get("vocab.json") or own.get("model", {}).get("vocab", {}))
        if tokens and not _clip_vocabulary(Tokenizer(77)).items() <= tokens.items():
            raise ValueError(f"{len(tokens):,} tokens of another vocabulary: use CLIP's tokenizer")
        added = [(token["content"], token["id"]) for token in own.get("added_tokens", [])]
        decoder = files.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
        added += [(token["content"], int(index)) for index, token in decoder.items()]
        return tokens | dict(added) | files.get("added_tokens.json", {})


def _learned(tokens: Mapping[str, int]) -> list[str]:
    """The tokens that follow CLIP's own, in order: those of textual inversion (Gal et al. 2022)."""
    names = {index: token for token, index in tokens.items() if index >= family.CLIP_VOCAB_SIZE}
    last = max(names, default=family.CLIP_VOCAB_SIZE - 1)
    return [names.get(i, f"<|reserved_token_{i}|>") for i in range(family.CLIP_VOCAB_SIZE, last + 1)]


def _clip_vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of CLIP's own tokens as transformers names them."""
    own = {token: index for token, index in tokenizer.encoder.items() if index < family.CLIP_VOCAB_SIZE}
    return {SPECIAL.get(token, token): index for token, index in own.items()}


def _read_tensors(folder: Path, stem: str, pickle_stem: str, pickles: bool) -> dict[str, Tensor]:
    """All tensors of a component: one file or several by an index, in float32 or as the fp16 variant."""
    for name, suffix in ((stem, "safetensors"), (pickle_stem, "bin")):
        for variant in ("", ".fp16"):
            index = folder / f"{name}.{suffix}.index{variant}.json"
            files = [folder / f"{name}{variant}.{suffix}"]
            if index.is_file():
                files = [folder / Path(part).name for part in sorted(set(read_json(index)["weight_map"].values()))]
            if all(file.is_file() for file in files):
                return {n: t for file in files for n, t in read_tensors(file, pickles=pickles).items()}
    raise ValueError(f"{folder} has no {stem}.safetensors: download the safetensors files of the model, too")


@contextmanager
def _open_config(path: Path, fixed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of a JSON file, of which `fixed` can only have one value; errors of the body name the file, too."""
    values = read_json(path)
    with family.config_errors(path):
        for name, supported in fixed.items():
            _translate(name, values.get(name, supported), {supported: None})
        yield values


def _translate(name: str, value: Any, table: Mapping[Any, Any]) -> Any:
    """What a value of theirs is here; ValueError when it is not supported."""
    if value not in list(table):
        raise ValueError(f"{name} is {value!r}: only {' and '.join(map(repr, table))} can be read")
    return table[value]


def _translate_back(value: Any, table: Mapping[str, Any]) -> str:
    return next(theirs for theirs, ours in table.items() if ours == value)


def _per_level(value: int | list[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


# Writing.


def write(components: ModelComponents, folder: Path) -> None:
    """Write a folder that diffusers' from_pretrained loads; ValueError when it cannot hold the model."""
    parts = components.to_export("a diffusers folder")
    _check_exportable(parts)
    _write_json(folder / "model_index.json", _index(parts))
    _write_unet(parts, folder / "unet")
    write_vae(parts.vae, folder / "vae", resolution=parts.resolution)
    _write_json(folder / "scheduler/scheduler_config.json", _scheduler_values(parts.diffusion.config))
    for encoder, suffix in zip(parts.text.encoders, ("", "_2"), strict=False):
        _write_text_encoder(folder / f"text_encoder{suffix}", encoder, parts.version)
        _write_tokenizer(folder / f"tokenizer{suffix}", encoder)


def _check_exportable(parts: ExportComponents) -> None:
    unet, diffusion, first = parts.unet.config, parts.diffusion.config, parts.text.encoders[0].config
    only = {
        "unet": {"mid_transformer_depth": max(unet.transformer_depth[-1], 1)},
        "text": family.SDXL_TEXT_1 if parts.version == "XL" else family.SD_TEXT,
        "second_text": family.SDXL_TEXT_2 | {"zero_empty_prompt": first.zero_empty_prompt},
    }
    padding = [encoder.config.pad_token_id for encoder in parts.text.encoders]
    is_flow = diffusion.noise_schedule == "flow"
    no_flow = " (StableDiffusionPipeline cannot run FlowMatchEulerDiscreteScheduler)" if is_flow else ""
    others = {
        f"diffusion.noise_schedule {diffusion.noise_schedule}{no_flow}": diffusion.noise_schedule not in BETAS,
        "diffusion.prediction": diffusion.prediction not in PREDICTIONS.values(),
        "text.pad_token_id": not {*padding} <= {*PADDING.values()},
    }
    parts.check(only, others)


def _index(parts: ExportComponents) -> dict[str, Any]:
    """model_index.json: the class of each component."""
    xl, inpainting = "XL" if parts.version == "XL" else "", "Inpaint" if parts.unet.config.cond_channels else ""
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
    if parts.version != "XL":
        return index | {"safety_checker": (None, None), "requires_safety_checker": False}
    return index | {
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "force_zeros_for_empty_prompt": parts.text.encoders[0].config.zero_empty_prompt,
        "image_encoder": (None, None),
    }


def _write_unet(parts: ExportComponents, folder: Path) -> None:
    config = parts.unet.config
    down = [_translate_back(depth > 0, UNET_BLOCKS) for depth in config.transformer_depth]
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
    if parts.version == "XL":
        values |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.size_embed_dim,
            "projection_class_embeddings_input_dim": config.pooled_dim + NUM_SIZE_CONDS * config.size_embed_dim,
        }
    _write_component(folder, values, parts.unet.state_dict(), key_map.unet_key_to_diffusers)


def write_vae(vae: VAE, folder: Path, *, resolution: int = 512) -> None:
    """Write the folder of an AutoencoderKL for images of this side; ValueError when it cannot hold the VAE.

    The scaling factor is 1, with all statistics in the weights, where the channels have their own.
    """
    check_vae(vae, "a diffusers folder", {})
    mean, std, config = vae.latent_mean, vae.latent_std, vae.config
    scale = 1 / std[0].item() if (std == std[0]).all() and not mean.any() else 1.0
    values = {
        "_class_name": "AutoencoderKL",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * len(config.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.widths),
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": scale,
        "sample_size": resolution,
    }
    _write_component(folder, values, folded_vae(vae, scale=scale), key_map.vae_key_to_diffusers)


def _scheduler_values(config: DiffusionConfig) -> dict[str, Any]:
    beta_start, beta_end = BETAS[config.noise_schedule]
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": config.noise_schedule,
        "prediction_type": _translate_back(config.prediction, PREDICTIONS),
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "beta_start": beta_start,
        "beta_end": beta_end,
    }


def _write_text_encoder(folder: Path, text: TextEncoder, version: str) -> None:
    """A tower; in version 2 the penultimate layer is the last one of a model that ends with it."""
    tower, projected = text.tower, text.config.use_pooled
    layers = len(tower.blocks) - (text.config.layer == "penultimate" and version != "XL")
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
        "hidden_act": _translate_back(tower.blocks[0].quick_gelu, ACTIVATIONS),
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
        "pad_token": _translate_back(text.config.pad_token_id, PADDING),
    }
    _write_json(folder / "special_tokens_map.json", special)
    more: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.tower.length}
    if learned := tokenizer.learned:
        _write_json(folder / "added_tokens.json", learned)  # which transformers before version 5 reads
        more["added_tokens_decoder"] = {index: {"content": token} for token, index in learned.items()}
    _write_json(folder / "tokenizer_config.json", special | more)


def _write_component(folder: Path, values: dict[str, Any], state: dict[str, Tensor], rename: key_map.Rename) -> None:
    _write_json(folder / "config.json", values)
    write_tensors(folder / f"{WEIGHTS}.safetensors", {rename(name): tensor for name, tensor in state.items()}, PYTORCH)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False))
