"""What the tensors of a U-Net and a VAE are called in CompVis files and in diffusers folders.

Each function takes a name of ours and gives theirs, without the prefix of the whole model. The networks are the same,
so tensors are only renamed; a 1x1 convolution over there may be a matrix here.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

Rename = Callable[[str], str]

TRANSFORMER = {
    r"\bblocks\.": "transformer_blocks.",
    r"\bself_attention\.": "attn1.",
    r"\bcross_attention\.": "attn2.",
    r"\bto_out\.": "to_out.0.",
    r"\bfeed_forward\.0\.": "ff.net.0.",
    r"\bfeed_forward\.1\.": "ff.net.2.",
}
FROM_TRANSFORMERS = {
    r"^embeddings\.token_embedding\.": "token_embedding.",
    r"^embeddings\.position_embedding\.weight": "positional_embedding",
    r"^encoder\.layers\.": "transformer.resblocks.",
    r"\.self_attn\.q_proj\.": ".attn.in_proj_",
    r"\.self_attn\.out_proj\.": ".attn.out_proj.",
    r"\.layer_norm([12])\.": r".ln_\1.",
    r"\.fc1\.": ".c_fc.",
    r"\.fc2\.": ".c_proj.",
    r"^final_layer_norm\.": "ln_final.",
}
DIFFUSERS_RESIDUAL = {r"\btime_proj\.": "time_emb_proj.", r"\bshortcut\.": "conv_shortcut."}
COMPVIS_RESIDUAL = {
    r"\bnorm1\.": "in_layers.0.",
    r"\bconv1\.": "in_layers.2.",
    r"\btime_proj\.": "emb_layers.1.",
    r"\bnorm2\.": "out_layers.0.",
    r"\bconv2\.": "out_layers.3.",
    r"\bshortcut\.": "skip_connection.",
}


def unet_key_to_diffusers(config: UNetConfig) -> Rename:
    """Names in `unet/diffusion_pytorch_model.safetensors`."""

    def rename(name: str) -> str:
        head, place, part, rest = _split_key(name)
        if head in ("down", "up", "middle"):
            rules = TRANSFORMER if part == "transformer" else DIFFUSERS_RESIDUAL
            kind = "attentions" if part == "transformer" else "resnets"
            folder = "mid_block" if head == "middle" else f"{head}_blocks.{place[0]}"
            return f"{folder}.{kind}.{place[-1]}.{_replaced(rest, rules)}"
        fixed = {
            r"^time_embed\.0": "time_embedding.linear_1",
            r"^time_embed\.2": "time_embedding.linear_2",
            r"^vector_embed\.0": "add_embedding.linear_1",
            r"^vector_embed\.2": "add_embedding.linear_2",
            r"^downsample\.(\d+)\.": r"down_blocks.\1.downsamplers.0.",
            r"^upsample\.(\d+)\.": r"up_blocks.\1.upsamplers.0.",
            r"^norm_out\.": "conv_norm_out.",
        }
        return _replaced(name, fixed)

    return rename


def unet_key_to_compvis(config: UNetConfig) -> Rename:
    """Names below `model.diffusion_model.`."""
    stride, last = config.num_res_blocks + 1, len(config.channel_mult) - 1

    def rename(name: str) -> str:
        head, place, part, rest = _split_key(name)
        if head in ("down", "up", "middle"):
            inner = _replaced(rest, TRANSFORMER if part == "transformer" else COMPVIS_RESIDUAL)
            if head == "middle":
                number = 1 if part == "transformer" else 2 * place[0] if config.mid_transformer_depth else place[0]
                return f"middle_block.{number}.{inner}"
            number = place[0] * stride + place[1] + (1 if head == "down" else 0)
            return f"{'input' if head == 'down' else 'output'}_blocks.{number}.{int(part == 'transformer')}.{inner}"
        if head == "downsample":
            return f"input_blocks.{(place[0] + 1) * stride}.0.{rest.replace('conv', 'op')}"
        if head == "upsample":
            beside = 2 if config.transformer_depth[last - place[0]] else 1
            return f"output_blocks.{place[0] * stride + config.num_res_blocks}.{beside}.{rest}"
        fixed = {
            r"^vector_embed\.": "label_emb.0.",
            r"^conv_in\.": "input_blocks.0.0.",
            r"^norm_out\.": "out.0.",
            r"^conv_out\.": "out.2.",
        }
        return _replaced(name, fixed)

    return rename


def vae_key_to_diffusers(config: VAEConfig) -> Rename:
    """Names in `vae/diffusion_pytorch_model.safetensors`."""

    def rename(name: str) -> str:
        name = _replaced(name, {r"\bnorm_out\.": "conv_norm_out.", r"\bshortcut\.": "conv_shortcut."})
        level = _level(name, config)
        if level:
            side, way, at, number, rest = level
            inner = f"{way}samplers.0" if number is None else f"resnets.{number}"
            return f"{side}.{way}_blocks.{at}.{inner}.{rest}"
        middle = _middle(name, config)
        if middle:
            side, kind, number, rest = middle
            if kind == "attention":
                rest = _replaced(rest, {r"^norm\.": "group_norm.", r"^to_out\.": "to_out.0."})
                return f"{side}.mid_block.attentions.0.{rest}"
            return f"{side}.mid_block.resnets.{number}.{rest}"
        return name

    return rename


def vae_key_to_compvis(config: VAEConfig) -> Rename:
    """Names below `first_stage_model.`."""

    def rename(name: str) -> str:
        name = _replaced(name, {r"\bshortcut\.": "nin_shortcut."})
        level = _level(name, config)
        if level:
            side, way, at, number, rest = level
            at = at if side == "encoder" else len(config.channel_mult) - 1 - at
            return f"{side}.{way}.{at}." + (f"{way}sample.{rest}" if number is None else f"block.{number}.{rest}")
        middle = _middle(name, config)
        if middle:
            side, kind, number, rest = middle
            if kind == "attention":
                rest = _replaced(rest, {r"^to_([qkv])\.": r"\1.", r"^to_out\.": "proj_out."})
                return f"{side}.mid.attn_1.{rest}"
            return f"{side}.mid.block_{number + 1}.{rest}"
        return name

    return rename


def rename_legacy_vae_keys(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an AutoencoderKL under the names that it has now; until 0.15 those of its attention were others."""
    new = {r"\.query\.": ".to_q.", r"\.key\.": ".to_k.", r"\.value\.": ".to_v.", r"\.proj_attn\.": ".to_out.0."}
    return {_replaced(name, new): tensor for name, tensor in theirs.items()}


def text_from_transformers(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a transformers CLIP text model under open_clip's names, which are ours.

    Where there is no projection of the pooled vector, as in Stable Diffusion 1 and 2, it is the identity.
    """
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("position_ids")}
    own: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if ".self_attn." in name and "out_proj" not in name:
            continue
        if name == "text_projection.weight":
            own["text_projection"] = tensor.T
        else:
            own[_replaced(name, FROM_TRANSFORMERS)] = tensor
    for name in [name for name in theirs if ".self_attn.q_proj." in name]:
        three = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(one in theirs for one in three):  # else the joined one is missed by who asks for it
            own[_replaced(name, FROM_TRANSFORMERS)] = torch.cat([theirs[one] for one in three])
    if "ln_final.weight" in own:
        own.setdefault("text_projection", torch.eye(own["ln_final.weight"].shape[0]))
    return own


def text_to_transformers(own: dict[str, Tensor], layers: int, *, projected: bool = False) -> dict[str, Tensor]:
    """The inverse: a transformers CLIP text model of the first `layers` blocks, with or without the projection."""
    theirs = {
        "embeddings.token_embedding.weight": own["token_embedding.weight"],
        "embeddings.position_embedding.weight": own["positional_embedding"],
        "final_layer_norm.weight": own["ln_final.weight"],
        "final_layer_norm.bias": own["ln_final.bias"],
    }
    parts = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(layers):
        block, their = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for end in ("weight", "bias"):
            for letter, tensor in zip("qkv", own[f"{block}.attn.in_proj_{end}"].chunk(3), strict=True):
                theirs[f"{their}.self_attn.{letter}_proj.{end}"] = tensor
            for name, new in parts.items():
                theirs[f"{their}.{new}.{end}"] = own[f"{block}.{name}.{end}"]
    theirs = {f"text_model.{name}": tensor for name, tensor in theirs.items()}
    if projected:
        theirs["text_projection.weight"] = own["text_projection"].T
    return {name: tensor.detach().cpu().contiguous() for name, tensor in theirs.items()}


def remap_state_dict(theirs: dict[str, Tensor], own: dict[str, Tensor], rename: Rename) -> dict[str, Tensor]:
    """Their tensors under our names and in our shapes; `own` are the names and shapes that are wanted.

    ValueError: tensors that are missing, left over or of another number of elements: the first five, by their names.
    """
    names = {name: rename(name) for name in own}
    missing = [their for their in names.values() if their not in theirs]
    extra = sorted(theirs.keys() - set(names.values()))
    for kind, wrong in (("missing", missing), ("extra", extra)):
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are {kind}: {', '.join(wrong[:5])}")
    shapes = [f"{their} is {tuple(theirs[their].shape)}, not {tuple(own[name].shape)}" for name, their in names.items()
              if _squeezed_shape(theirs[their]) != _squeezed_shape(own[name])]  # fmt: skip
    if shapes:
        raise ValueError(f"{len(shapes)} tensors have another shape: {'; '.join(shapes[:5])}")
    found = {name: theirs[their].reshape(own[name].shape) for name, their in names.items()}
    bad = [names[name] for name, tensor in found.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{len(bad)} tensors hold NaN or infinite numbers: {', '.join(bad[:5])}")
    return found


def _split_key(name: str) -> tuple[str, list[int], str, str]:
    """`down.1.0.residual.norm1.weight` -> down, [1, 0], residual, norm1.weight."""
    found = re.match(r"([a-z_]+)((?:\.\d+)*)\.(?:(residual|transformer)\.)?(.*)", name)
    assert found is not None
    return found[1], [int(number) for number in found[2].split(".")[1:]], found[3] or "", found[4]


def _level(name: str, config: VAEConfig) -> tuple[str, str, int, int | None, str] | None:
    """Side, way, level, block (None: the change of resolution) and rest of a name in a level of the VAE."""
    found = re.match(r"(encoder|decoder)\.levels\.(\d+)\.(\d+)\.(.*)", name)
    if not found:
        return None
    side, number = found[1], int(found[3])
    last = config.num_res_blocks + (side == "decoder")
    return side, "down" if side == "encoder" else "up", int(found[2]), None if number == last else number, found[4]


def _middle(name: str, config: VAEConfig) -> tuple[str, str, int, str] | None:
    """Side, kind, number and rest of a name in the middle of the VAE."""
    found = re.match(r"(encoder|decoder)\.middle\.(\d)\.(.*)", name)
    if not found:
        return None
    number, attention = int(found[2]), config.mid_attention
    kind = "attention" if attention and number == 1 else "residual"
    return found[1], kind, number // 2 if attention else number, found[3]


def _replaced(name: str, rules: dict[str, str]) -> str:
    for pattern, new in rules.items():
        name = re.sub(pattern, new, name)
    return name


def _squeezed_shape(tensor: Tensor) -> list[int]:
    """The shape, of a 1x1 convolution that of its matrix."""
    shape = list(tensor.shape)
    return shape[:2] if shape[2:] == [1, 1] else shape
