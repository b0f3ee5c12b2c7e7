"""What a single file holds that is not a whole Stable Diffusion model: told by the names of its tensors."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

READABLE = "only whole models of Stable Diffusion 1, 2 and XL, also for inpainting, can be read"
VAE_MARK = "decoder.conv_in.weight"  # in files of CompVis and of diffusers
# The first that fits: a file for ControlNet, say, can hold all of Stable Diffusion, too.
KINDS = {
    "a LoRA": r"^(lora|lycoris)_|_lora\.(up|down)|\blora_(up|down|[AB])\b|\.(hada|lokr)_",
    "a ControlNet": r"^control_model\.|^controlnet_|input_hint_block\.",
    "a T2I-Adapter": r"^adapter\.body\.|^body\.\d+\.in_conv\.",
    "an IP-Adapter": r"^(image_proj|ip_adapter)\.",
    "a textual inversion": r"^(emb_params|string_to_param|clip_[lg])$|^<.*>$",
    "a motion module (AnimateDiff)": r"\bmotion_modules\.",
    "Stable Video Diffusion": r"\.time_stack\.",
    "Stable Diffusion 3": r"\bjoint_blocks\.",
    "Flux": r"\b(double_blocks|single_transformer_blocks)\.",
    "Stable Cascade": r"\bclip_txt(_pooled)?_mapper\.",
    "a diffusion transformer": r"adaln_single|adaLN_modulation|\bcap_embedder\.",
    "Stable Diffusion 2 unCLIP": r"^(noise_augmentor|embedder)\.",
    "Stable Diffusion 2 for depth": r"^depth_model\.",
    "the upscaler of Stable Diffusion 2": r"^low_scale_model\.",
    "a model of the XL kind on an EDM schedule": r"^edm_(mean|vpred)",
    "a latent diffusion model before Stable Diffusion, with a BERT": r"^cond_stage_model\.transformer\.attn_layers\.",
    "an image upscaler (ESRGAN)": r"\bRDB1\.|\brdb1\.",
    "a T5 text encoder": r"^(encoder|decoder)\.block\.\d+\.layer\.",
    "a VQ autoencoder": r"\bquantize\.embedding",
    "a tiny autoencoder (TAESD)": r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.",
}
ALONE = {
    "a VAE alone, for --vae of train_ldm.py": rf"^{re.escape(VAE_MARK)}$",
    "a U-Net alone": r"^down_blocks\.\d+\.resnets\.",
    "a text tower alone": r"^text_model\.|^transformer\.resblocks\.",
}
REFINER, SECOND_TOWER = "conditioner.embedders.0.model.", "conditioner.embedders.1."
INPUT_CHANNELS = {5: "for depth", 7: "for upscaling", 8: "for InstructPix2Pix"}  # of U-Nets with 4 output channels


def check_kind(tensors: Mapping[str, Tensor], file: Path) -> None:
    """ValueError names what a file is that holds something else than Stable Diffusion."""
    if kind := _find(tensors, KINDS):
        raise ValueError(f"{file} is {kind}: {READABLE}")
    has_refiner, has_second = (any(name.startswith(prefix) for name in tensors) for prefix in (REFINER, SECOND_TOWER))
    if has_refiner and not has_second:
        raise ValueError(f"{file} is the refiner of Stable Diffusion XL: {READABLE}")


def name_part(tensors: Mapping[str, Tensor]) -> str | None:
    """Which part of a model these tensors are, in words."""
    return _find(tensors, ALONE)


def check_input_channels(in_channels: int, out_channels: int) -> None:
    """ValueError names what a U-Net is for that takes more than latents, or the mask and latents of inpainting."""
    if in_channels not in (out_channels, 2 * out_channels + 1):
        purpose = INPUT_CHANNELS.get(in_channels, "of another kind")
        raise ValueError(f"a U-Net {purpose}, with {in_channels} input channels: {READABLE}")


def _find(tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> str | None:
    return next((kind for kind, name in kinds.items() if any(map(re.compile(name).search, tensors))), None)
