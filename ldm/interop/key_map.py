"""What the tensors of a pipeline are called in CompVis files and in diffusers folders.

The networks are the same, so tensors are only renamed; a 1x1 convolution there may be a matrix here. Each table has
patterns of our names and what they become, in order: first the layers in a block, then the blocks.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ldm.io.tensors import check_finite, check_shapes
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

Rename = Callable[[str], str]

TRANSFORMER = {
    r"(?<=transformer\.)blocks\.": "transformer_blocks.",
    r"\bself_attention\.": "attn1.",
    r"\bcross_attention\.": "attn2.",
    r"(?<=attn[12]\.)to_out\.": "to_out.0.",
    r"\bfeed_forward\.0\.": "ff.net.0.",
    r"\bfeed_forward\.1\.": "ff.net.2.",
}
UNET_DIFFUSERS = TRANSFORMER | {
    r"\btime_proj\.": "time_emb_proj.",
    r"\bshortcut\.": "conv_shortcut.",
    r"^(down|up)\.(\d+)\.(\d+)\.residual\.": r"\1_blocks.\2.resnets.\3.",
    r"^(down|up)\.(\d+)\.(\d+)\.transformer\.": r"\1_blocks.\2.attentions.\3.",
    r"^middle\.(\d)\.residual\.": r"mid_block.resnets.\1.",
    r"^middle\.0\.transformer\.": "mid_block.attentions.0.",
    r"^(down|up)sample\.(\d+)\.": r"\1_blocks.\2.\1samplers.0.",
    r"^(time|vector)_embed\.0\.": r"\1_embedding.linear_1.",
    r"^(time|vector)_embed\.2\.": r"\1_embedding.linear_2.",
    r"^vector_embedding\.": "add_embedding.",
    r"^norm_out\.": "conv_norm_out.",
}
UNET_COMPVIS = TRANSFORMER | {
    r"(?<=residual\.)norm1\.": "in_layers.0.",
    r"(?<=residual\.)conv1\.": "in_layers.2.",
    r"(?<=residual\.)time_proj\.": "emb_layers.1.",
    r"(?<=residual\.)norm2\.": "out_layers.0.",
    r"(?<=residual\.)conv2\.": "out_layers.3.",
    r"(?<=residual\.)shortcut\.": "skip_connection.",
    r"^conv_in\.": "input_blocks.0.0.",
    r"^vector_embed\.": "label_emb.0.",
    r"^norm_out\.": "out.0.",
    r"^conv_out\.": "out.2.",
}
VAE_DIFFUSERS = {
    r"\bnorm_out\.": "conv_norm_out.",
    r"\bshortcut\.": "conv_shortcut.",
    r"^encoder\.levels\.": "encoder.down_blocks.",
    r"^decoder\.levels\.": "decoder.up_blocks.",
    r"(down|up)_blocks\.(\d+)\.\d+\.conv\.": r"\1_blocks.\2.\1samplers.0.conv.",
    r"(?<=_blocks\.)(\d+)\.(\d+)\.": r"\1.resnets.\2.",
    r"\bmiddle\.1\.norm\.": "mid_block.attentions.0.group_norm.",
    r"\bmiddle\.1\.to_out\.": "mid_block.attentions.0.to_out.0.",
    r"\bmiddle\.1\.to_": "mid_block.attentions.0.to_",
    r"\bmiddle\.0\.": "mid_block.resnets.0.",
    r"\bmiddle\.[12]\.": "mid_block.resnets.1.",
}
VAE_COMPVIS = {
    r"\bshortcut\.": "nin_shortcut.",
    r"^encoder\.levels\.": "encoder.down.",
    r"\b(down|up)\.(\d+)\.\d+\.conv\.": r"\1.\2.\1sample.conv.",
    r"\b(down|up)\.(\d+)\.(\d+)\.": r"\1.\2.block.\3.",
    r"\bmiddle\.1\.to_out\.": "mid.attn_1.proj_out.",
    r"\bmiddle\.1\.(?:to_)?(q|k|v|norm)\.": r"mid.attn_1.\1.",
    r"\bmiddle\.0\.": "mid.block_1.",
    r"\bmiddle\.[12]\.": "mid.block_2.",
}
# Until diffusers 0.15 the attention of an AutoencoderKL had other names.
VAE_LEGACY = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# open_clip's names, which are ours, and those of transformers; of the projections q, k and v only the first.
TEXT_TRANSFORMERS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "transformer.resblocks.": "encoder.layers.",
    ".attn.in_proj_": ".self_attn.q_proj.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
    "ln_final.": "final_layer_norm.",
}


def _substitute(name: str, table: Mapping[str, str]) -> str:
    for pattern, new in table.items():
        name = re.sub(pattern, new, name)
    return name


# Names in diffusion_pytorch_model.safetensors of unet/ and of vae/.
unet_key_to_diffusers: Rename = partial(_substitute, table=UNET_DIFFUSERS)
vae_key_to_diffusers: Rename = partial(_substitute, table=VAE_DIFFUSERS)


def unet_key_to_compvis(config: UNetConfig) -> Rename:
    """Names below `model.diffusion_model.`, where all blocks of one side are numbered through."""
    last, blocks = len(config.transformer_depth) - 1, config.num_res_blocks
    table = UNET_COMPVIS | {
        r"^middle\.0\.residual\.": "middle_block.0.",
        r"^middle\.0\.transformer\.": "middle_block.1.",
        r"^middle\.1\.residual\.": f"middle_block.{2 if config.mid_transformer_depth else 1}.",
    }
    for level in range(last + 1):
        first = level * (blocks + 1)  # a change of resolution ends each level
        in_level = 2 if config.transformer_depth[last - level] else 1  # modules of a block before the upsampling
        table[rf"^downsample\.{level}\.conv\."] = f"input_blocks.{first + blocks + 1}.0.op."
        table[rf"^upsample\.{level}\."] = f"output_blocks.{first + blocks}.{in_level}."
        for index, kind in enumerate(("residual", "transformer")):
            for i in range(blocks + 1):
                table[rf"^down\.{level}\.{i}\.{kind}\."] = f"input_blocks.{first + 1 + i}.{index}."
                table[rf"^up\.{level}\.{i}\.{kind}\."] = f"output_blocks.{first + i}.{index}."
    return partial(_substitute, table=table)


def vae_key_to_compvis(config: VAEConfig) -> Rename:
    """Names below `first_stage_model.`, where the levels of the decoder are numbered from the highest resolution on."""
    count = len(config.channel_mult)
    levels = {rf"^decoder\.levels\.{level}\.": f"decoder.up.{count - 1 - level}." for level in range(count)}
    return partial(_substitute, table=levels | VAE_COMPVIS)


def text_from_transformers(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a transformers CLIP text model under open_clip's names, which are ours.

    Where the pooled vector has no projection, as in Stable Diffusion 1 and 2, it is the identity.
    """
    theirs = {name.removeprefix("text_model."): t for name, t in theirs.items() if not name.endswith("position_ids")}
    for name in [name for name in theirs if ".q_proj." in name]:
        theirs[name] = torch.cat([theirs.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"])
    ours = replace_in_names(theirs, {their: our for our, their in TEXT_TRANSFORMERS.items()})
    if "text_projection.weight" in ours:
        ours["text_projection"] = ours.pop("text_projection.weight").T
    else:
        ours["text_projection"] = torch.eye(ours["ln_final.weight"].shape[0])
    return ours


def text_to_transformers(ours: Mapping[str, Tensor], layers: int, *, projected: bool = False) -> dict[str, Tensor]:
    """The inverse: a transformers CLIP text model of the first `layers` blocks, with or without the projection."""
    theirs: dict[str, Tensor] = {"text_projection.weight": ours["text_projection"].T} if projected else {}
    for name, tensor in replace_in_names(ours, TEXT_TRANSFORMERS).items():
        block = re.match(r"encoder\.layers\.(\d+)\.", name)
        if name == "text_projection" or (block and int(block[1]) >= layers):
            continue
        for letter, part in zip("qkv", tensor.chunk(3) if ".q_proj." in name else [tensor], strict=False):
            theirs["text_model." + name.replace(".q_proj.", f".{letter}_proj.")] = part
    return theirs


def remap_state_dict(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], rename: Rename, where: object
) -> dict[str, Tensor]:
    """Their tensors under the names and in the shapes of `ours`; `rename` gives theirs for one of our names.

    ValueError: see `check_shapes`, for which a 1x1 convolution is a matrix, and `check_finite`.
    """
    names = {name: rename(name) for name in ours}
    matrices = {name: _as_matrix(tensor) for name, tensor in theirs.items()}
    check_shapes(matrices, {names[name]: _as_matrix(tensor) for name, tensor in ours.items()}, where)
    check_finite(theirs, where)
    return {name: theirs[their].reshape(ours[name].shape) for name, their in names.items()}


def replace_in_names(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors with each key of the table in their names replaced by its value."""
    patterns = {re.escape(old): new for old, new in table.items()}
    return {_substitute(name, patterns): tensor for name, tensor in tensors.items()}


def _as_matrix(tensor: Tensor) -> Tensor:
    """The matrix of a 1x1 convolution; other tensors as they are."""
    return tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor
