"""The components of a pipeline, and which of them the formats of others can hold."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.process import Diffusion
from ldm.text import TextConditioner
from ldm.unet import UNet
from ldm.vae import VAE

EXPORTABLE = "a model of the recipe configs/exportable/ can be exported"
VAE_ONLY: dict[str, Any] = {"patch_size": 1}  # of a VAE, in all formats


class ModelComponents(NamedTuple):
    """What a pipeline is made of."""

    unet: UNet
    diffusion: Diffusion
    vae: VAE | None  # None: diffusion in pixels
    text: TextConditioner | None  # None: unconditional
    resolution: int  # side of the training images, in pixels
    vocabulary: Sequence[str] = ()  # words of the training captions; empty: unknown
    metadata: Mapping[str, Any] = MappingProxyType({})  # of a training here: data, guidance scale; empty: unknown

    @property
    def description(self) -> str:
        """What kind of model this is, in words."""
        if self.vae is None or self.text is None or self.metadata:
            return "a model of ldm"
        inpainting = " for inpainting" if self.unet.config.cond_channels else ""
        config = self.diffusion.config
        predicts = f"predicts {config.prediction}{' at zero terminal SNR' if config.zero_terminal_snr else ''}"
        return f"Stable Diffusion {_version(self.text)}{inpainting}, {predicts}, {self.resolution} pixels"

    def to_export(self, target: str) -> "ExportComponents":
        """The components that a format of Stable Diffusion can hold; ValueError where there is no VAE or no text."""
        if self.vae is None or self.text is None:
            lacks = "VAE" if self.vae is None else "text tower"
            raise ValueError(f"cannot export to {target}: the model has no {lacks}; only a folder of ldm can hold it")
        version = _version(self.text)
        return ExportComponents(self.unet, self.diffusion, self.vae, self.text, self.resolution, version, target)


class ExportComponents(NamedTuple):
    """Components to write in another format."""

    unet: UNet
    diffusion: Diffusion
    vae: VAE
    text: TextConditioner
    resolution: int
    version: str  # of Stable Diffusion: 1, 2 or XL
    target: str  # the format, in words

    def check(self, only: Mapping[str, Mapping[str, Any]], others: Mapping[str, bool]) -> None:
        """ValueError names the settings that the format cannot hold.

        `only` has, by part and name, the one value that it can hold; `others` has settings, and whether they differ.
        """
        unet, is_xl = self.unet.config, self.version == "XL"
        configs: dict[str, Any] = {"unet": unet, "vae": self.vae.config, "diffusion": self.diffusion.config}
        configs |= zip(("text", "second_text"), (encoder.config for encoder in self.text.encoders), strict=False)
        in_all_formats = {"patch_size": 1, "coord_conv": False, "refine_channels": 0}
        in_all_formats |= {} if is_xl else {"pooled_dim": 0, "size_embed_dim": 0}
        only = {**only, "unet": {**in_all_formats, **only.get("unet", {})}, "vae": {**VAE_ONLY, **only.get("vae", {})}}
        others = {
            "unet.size_embed_dim 0": is_xl and not unet.size_embed_dim,
            "unet.norm_min_group_channels": len({*unet.norm_groups.values()}) > 1,
            **others,
        }
        _check(self.target, configs, only, others)


def check_vae(vae: VAE, target: str, only: Mapping[str, Any]) -> None:
    """ValueError names the settings of a VAE that the format `target` cannot hold, where it can hold `only` others."""
    _check(target, {"vae": vae.config}, {"vae": {**VAE_ONLY, **only}}, {})


def _check(
    target: str,
    configs: Mapping[str, Any],
    only: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, bool],
) -> None:
    wrong = [
        f"{part}.{name} {getattr(config, name)} (only {value})"
        for part, config in configs.items()
        for name, value in only.get(part, {}).items()
        if getattr(config, name) != value
    ]
    wrong += [name for name, differs in others.items() if differs]
    if wrong:
        settings = ", ".join(wrong)
        raise ValueError(f"cannot export to {target}: unsupported settings {settings}: {EXPORTABLE}")


def folded_vae(vae: VAE, *, scale: float) -> dict[str, Tensor]:
    """The VAE's tensors, its latent statistics folded into the two 1x1 convolutions so that `scale` remains."""
    state = {name: tensor.clone() for name, tensor in vae.state_dict().items() if not name.startswith("latent_")}
    mean, std, channels = vae.latent_mean, vae.latent_std * scale, vae.config.latent_channels
    factor = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([mean / std, 2 * std.log()])
    state["quant_conv.weight"] *= factor[:, None, None, None]
    state["quant_conv.bias"] = state["quant_conv.bias"] * factor - shift
    weight = state["post_quant_conv.weight"]
    state["post_quant_conv.bias"] += weight[:, :, 0, 0] @ mean
    state["post_quant_conv.weight"] = weight * std.reshape(1, channels, 1, 1)
    return state


def _version(text: TextConditioner) -> str:
    """Of Stable Diffusion 1, 2 or XL, the one whose text towers these are like."""
    if len(text.encoders) == 2:
        return "XL"
    return "1" if text.encoders[0].tower.blocks[0].quick_gelu else "2"
