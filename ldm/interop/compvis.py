"""Single files of CompVis and Stability, Stable Diffusion 1 and 2: read and written. What they hold is seen from keys
and shapes."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.diffusion.process import Prediction, Process, ProcessConfig
from ldm.interop import names
from ldm.interop.parts import Parts, check_foldable, checked, fill, folded, network_of, read_file
from ldm.text import TextConfig, TextEncoder
from ldm.text.encoder import CONVERTED, TextTower, make_tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

UNET, EMA, VAE_PREFIX = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
TEXT1, TEXT2, TEXT_XL = "cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner."
SCALE = 0.18215  # of the latents, in no file: the configuration beside it has it
HEAD = 64  # width of a head where heads can not be seen from shapes
V_SPREAD = 0.09  # of the bias below, above which ComfyUI takes a network for one that predicts v; nothing else shows it
V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"

Tensors = dict[str, Tensor]


def read(file: Path, *, ema: bool = False, pickles: bool = False) -> Parts:
    """The parts of a Stable Diffusion 1 or 2 file, with the averaged weights of the U-Net if asked.

    With `pickles` a .ckpt file is read too, its tensors and nothing that runs.
    ValueError: no safetensors file, none of the known kinds, tensors that are missing, extra, misshapen or not finite.
    """
    tensors = _read_pickle(file) if pickles and file.suffix == ".ckpt" else read_file(file)
    unet_tensors = _below(tensors, UNET)
    if "input_blocks.0.0.weight" not in unet_tensors or not _below(tensors, VAE_PREFIX):
        found = ", ".join(sorted({name.split(".")[0] for name in tensors})[:5])
        raise ValueError(f"{file} is no Stable Diffusion file: it has {found}, not {UNET}* and {VAE_PREFIX}*")
    if _below(tensors, TEXT_XL):
        raise ValueError(f"{file} is a Stable Diffusion XL file; only 1 and 2 can be read")
    if ema:
        averaged = {name: tensors.get(EMA + name.replace(".", "")) for name in unet_tensors}
        if missing := [name for name, tensor in averaged.items() if tensor is None]:
            raise ValueError(f"{file} has no averaged weights of {len(missing)} tensors, such as {missing[0]}")
        unet_tensors = {name: tensor for name, tensor in averaged.items() if tensor is not None}
    unet = network_of(UNet, unet_config(unet_tensors), unet_tensors, names.unet_in_compvis, f"{file}: {UNET}")
    vae_tensors = _below(tensors, VAE_PREFIX)
    vae = network_of(VAE, vae_config(vae_tensors), vae_tensors, names.vae_in_compvis, f"{file}: {VAE_PREFIX}")
    vae.latent_std.fill_(1 / SCALE)
    first = bool(_below(tensors, TEXT1))
    prediction: Prediction = "epsilon"
    if not first and V_BIAS in unet_tensors and unet_tensors[V_BIAS].float().std() > V_SPREAD:
        prediction = "v"
    size = vae.config.factor * (96 if prediction == "v" else 64)
    return Parts(unet, Process(ProcessConfig(prediction=prediction)), vae, read_text(tensors, file), size)


def write(parts: Parts, file: Path) -> None:
    """Write one file; ValueError when the format can not hold the model."""
    check_foldable(parts, "a CompVis file")
    text, first = parts.text, parts.text.tower.blocks[0].quick_gelu
    process = parts.process.config
    if process.path != "scaled_linear" or process.prediction not in (("epsilon",) if first else ("epsilon", "v")):
        raise ValueError(f"a CompVis file can not hold this model: its process is {process.path}, {process.prediction}")
    if text.config.padding != (49407 if first else 0) or (first and text.config.layer != "last"):
        raise ValueError("a CompVis file can not hold this model: its text layer or padding is not that of the family")
    state = {}
    rename = names.unet_in_compvis(parts.unet.config)
    for name, tensor in parts.unet.state_dict().items():
        square = first and re.search(r"\.proj_(in|out)\.weight$", name)
        state[UNET + rename(name)] = tensor[:, :, None, None] if square else tensor
    rename = names.vae_in_compvis(parts.vae.config)
    for name, tensor in folded(parts.vae, scale=SCALE).items():
        square = re.search(r"middle\.1\.to_\w+\.weight$", name)
        state[VAE_PREFIX + rename(name)] = tensor[:, :, None, None] if square else tensor
    tower = text.tower.state_dict()
    if first:
        theirs = names.text_in_transformers(tower, len(text.tower.blocks))
        state |= {TEXT1 + name: tensor for name, tensor in theirs.items()}
    else:
        if text.config.layer == "last":  # theirs is read before its last block, which is then never used
            last = f"transformer.resblocks.{len(text.tower.blocks)}."
            copy = {n: t for n, t in tower.items() if n.startswith("transformer.resblocks.0.")}
            tower |= {n.replace("transformer.resblocks.0.", last): torch.zeros_like(t) for n, t in copy.items()}
        state |= {TEXT2 + name: tensor for name, tensor in tower.items()}
    state["alphas_cumprod"] = parts.process.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000).square().float()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, file)


def unet_config(tensors: Tensors) -> UNetConfig:
    """Our configuration of a U-Net, from its shapes."""
    channels, in_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    levels: list[list[int]] = [[]]  # numbers of the input blocks of each level
    for number in range(1, 1 + _count(tensors, "input_blocks", start=1)):
        if f"input_blocks.{number}.0.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(number)
    widths = [tensors[f"input_blocks.{level[0]}.0.in_layers.2.weight"].shape[0] for level in levels]
    depths = [_count(tensors, f"input_blocks.{level[0]}.1.transformer_blocks") for level in levels]
    crossed = [tensor for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")]
    square = any(tensor.ndim == 4 for name, tensor in tensors.items() if name.endswith("proj_in.weight"))
    return UNetConfig(
        in_channels=in_channels,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=len(levels[0]),
        depths=tuple(depths),
        middle_depth=_count(tensors, "middle_block.1.transformer_blocks"),
        heads=tuple(8 if square else max(width // HEAD, 1) for width in widths),
        context_width=crossed[0].shape[1] if crossed else 0,
    )


def vae_config(tensors: Tensors) -> VAEConfig:
    """Our configuration of a VAE, from its shapes."""
    channels, image_channels = tensors["encoder.conv_in.weight"].shape[:2]
    widths = [
        tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0]
        for level in range(_count(tensors, "encoder.down"))
    ]
    return VAEConfig(
        image_channels=image_channels,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=_count(tensors, "encoder.down.0.block"),
        attention="encoder.mid.attn_1.q.weight" in tensors,
        latent_channels=tensors["post_quant_conv.weight"].shape[0],
    )


def read_text(tensors: Tensors, file: Path) -> TextEncoder:
    """The text tower: transformers' names in version 1, open_clip's in version 2."""
    first = _below(tensors, TEXT1)
    own = names.text_from_transformers(first) if first else _below(tensors, TEXT2)
    own = {name: tensor for name, tensor in own.items() if name not in ("attn_mask", "logit_scale")}
    if "positional_embedding" not in own or "text_projection" not in own:
        raise ValueError(f"{file} has no text tower: neither {TEXT1}* nor {TEXT2}*")
    length, width = own["positional_embedding"].shape
    text = {
        "context_length": length,
        "vocab_size": own["token_embedding.weight"].shape[0],
        "width": width,
        "heads": max(width // HEAD, 1),
        "layers": _count(own, "transformer.resblocks"),
        "mlp_ratio": own["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
    }
    with torch.device("meta"):
        tower = TextTower({"embed_dim": own["text_projection"].shape[1], "quick_gelu": bool(first), "text_cfg": text})
    fill(tower, checked(own, tower.state_dict(), str, f"{file}: text"))
    config = TextConfig(model=str(file), layer="last" if first else "penultimate", padding=49407 if first else 0)
    return TextEncoder(tower, make_tokenizer(length), config, source=CONVERTED, weights=file)


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
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _count(tensors: Tensors, prefix: str, *, start: int = 0) -> int:
    """How many numbers from `start` on follow `prefix.`."""
    found = {
        int(name[len(prefix) + 1 :].split(".")[0]) for name in tensors if re.match(rf"{re.escape(prefix)}\.\d", name)
    }
    return sum(number >= start for number in found)
