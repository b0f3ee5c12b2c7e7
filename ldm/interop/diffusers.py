"""Folders of diffusers' StableDiffusionPipeline: read."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.diffusion.process import Process, ProcessConfig
from ldm.interop import names
from ldm.text import TextConfig, TextEncoder
from ldm.text.encoder import TextTower, make_tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
PADDING = {"<|endoftext|>": 49407, "!": 0}
# Settings that our networks have no other value of; what a file leaves out is the first.
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "norm_num_groups": (32,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "dual_cross_attention": (False,),
    "only_cross_attention": (False,),
    "class_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
}
VAE_FIXED: dict[str, tuple[Any, ...]] = {"act_fn": ("silu",), "norm_num_groups": (32,), "use_quant_conv": (True,)}


class Parts(NamedTuple):
    """What a pipeline is made of."""

    unet: UNet
    process: Process
    vae: VAE
    text: TextEncoder
    size: int


def is_folder(path: Path) -> bool:
    """Whether diffusers wrote this folder."""
    return (path / "model_index.json").is_file()


def read(folder: Path) -> Parts:
    """The parts of a Stable Diffusion 1 or 2 pipeline; ValueError names what is missing or not known here."""
    kind = _json(folder / "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder} holds a {kind}; only a StableDiffusionPipeline can be read")
    values = _json(folder / "unet/config.json")
    unet = _filled(UNet, unet_config(values, folder), folder / "unet", names.unet_in_diffusers)
    vae_values = _json(folder / "vae/config.json")
    vae = _filled(VAE, vae_config(vae_values, folder), folder / "vae", names.vae_in_diffusers)
    vae.latent_std.fill_(1 / vae_values.get("scaling_factor", 0.18215))
    vae.latent_mean.fill_(vae_values.get("shift_factor") or 0.0)
    process = Process(process_config(_json(folder / "scheduler/scheduler_config.json"), folder))
    size = values["sample_size"] * vae.config.factor
    return Parts(unet, process, vae, read_text(folder), size)


def unet_config(values: dict[str, Any], folder: Path) -> UNetConfig:
    """Our configuration of a U-Net from unet/config.json."""
    _check_fixed(values, UNET_FIXED, folder / "unet/config.json")
    widths = values["block_out_channels"]
    levels = len(widths)
    depths = _each(values.get("transformer_layers_per_block", 1), levels)
    crossed = ["CrossAttn" in name for name in values["down_block_types"]]
    return UNetConfig(
        in_channels=values["in_channels"],
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=values.get("layers_per_block", 2),
        depths=tuple(depth if cross else 0 for depth, cross in zip(depths, crossed, strict=True)),
        middle_depth=depths[-1],
        heads=tuple(_each(values.get("num_attention_heads") or values["attention_head_dim"], levels)),
        context_width=values["cross_attention_dim"],
        vector_width=values.get("projection_class_embeddings_input_dim") or 0,
        scale_shift=values.get("resnet_time_scale_shift", "default") == "scale_shift",
    )


def vae_config(values: dict[str, Any], folder: Path) -> VAEConfig:
    """Our configuration of a VAE from vae/config.json."""
    _check_fixed(values, VAE_FIXED, folder / "vae/config.json")
    widths = values["block_out_channels"]
    return VAEConfig(
        image_channels=values["in_channels"],
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=values["layers_per_block"],
        attention=values.get("mid_block_add_attention", True),
        latent_channels=values["latent_channels"],
    )


def process_config(values: dict[str, Any], folder: Path) -> ProcessConfig:
    """Our configuration of the process from a scheduler's."""
    path = values.get("beta_schedule")
    if path not in BETAS or (values["beta_start"], values["beta_end"]) != BETAS[path]:
        raise ValueError(f"{folder}/scheduler: betas of {path} from {values.get('beta_start')} are not known here")
    prediction = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}[values.get("prediction_type", "epsilon")]
    zero = values.get("rescale_betas_zero_snr", False)
    config = {"path": path, "prediction": prediction, "zero_terminal_snr": zero}
    return ProcessConfig.from_dict(config, source=f"{folder}/scheduler")


def read_text(folder: Path) -> TextEncoder:
    """The frozen text tower of text_encoder/, which fills prompts up as tokenizer/ says."""
    values = _json(folder / "text_encoder/config.json")
    text = {
        "context_length": values["max_position_embeddings"],
        "vocab_size": values["vocab_size"],
        "width": values["hidden_size"],
        "heads": values["num_attention_heads"],
        "layers": values["num_hidden_layers"],
        "mlp_ratio": values["intermediate_size"] / values["hidden_size"],
    }
    tensors = names.text_from_transformers(_tensors(folder / "text_encoder", "model"))
    quick = values.get("hidden_act", "quick_gelu") == "quick_gelu"
    with torch.device("meta"):
        tower = TextTower({"embed_dim": tensors["text_projection"].shape[1], "quick_gelu": quick, "text_cfg": text})
    _load(tower, names.renamed(tensors, tower.state_dict(), str), folder / "text_encoder")
    pad = _json(folder / "tokenizer/tokenizer_config.json").get("pad_token", "<|endoftext|>")
    padding = PADDING.get(pad["content"] if isinstance(pad, dict) else pad)
    if padding is None:
        raise ValueError(f"{folder}/tokenizer fills prompts with {pad!r}; only {' and '.join(PADDING)} are known here")
    config = TextConfig(model=str(folder), padding=padding)
    return TextEncoder(tower, make_tokenizer(tower.length), config, source="diffusers", weights=folder / "text_encoder")


def _filled(cls: Any, config: Any, folder: Path, rename_of: Any) -> Any:
    """A network with the weights of a component's folder; buffers of ours alone keep their start."""
    network = cls(config)
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("latent_")}
    try:
        found = names.renamed(_tensors(folder, "diffusion_pytorch_model"), own, rename_of(config))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return _load(network, {**network.state_dict(), **found}, folder)


def _load(network: nn.Module, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network.requires_grad_(False).eval()


def _tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a component: one file or several by an index, in float32 or as the fp16 variant."""
    for variant in ("", ".fp16"):
        index = folder / f"{stem}.safetensors.index{variant}.json"
        files = [folder / f"{stem}{variant}.safetensors"]
        if index.is_file():
            files = [folder / Path(name).name for name in sorted(set(_json(index)["weight_map"].values()))]
        if all(file.is_file() for file in files):
            return {name: tensor for file in files for name, tensor in _one_file(file).items()}
    raise ValueError(f"{folder} has no {stem}.safetensors: fetch the one that its page offers as safetensors")


def _one_file(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); fetch it again") from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the diffusers folder is not whole")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: fetch it again") from None


def _check_fixed(values: dict[str, Any], fixed: dict[str, tuple[Any, ...]], path: Path) -> None:
    for name, allowed in fixed.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: {name} is {values[name]!r}; only {allowed[0]!r} is known here")


def _each(value: int | list[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)
