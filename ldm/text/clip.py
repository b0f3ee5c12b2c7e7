"""A small OpenCLIP to train from scratch: open_clip's own model and loss."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ldm.config import Config
from ldm.io.atomic import write_text
from ldm.io.tensors import save_weights
from ldm.text.tokenizer import Tokenizer
from ldm.text.weights import CONFIG_NAME, WEIGHTS_NAME


class CLIPConfig(Config):
    """Sizes of both towers; the vocabulary is CLIP's own, 49,408 byte pairs."""

    embed_dim: int = Field(128, ge=8)
    """width of the space that images and texts share"""
    context_length: int = Field(32, ge=4)
    """tokens of a prompt, with start and end token"""
    width: int = Field(128, ge=32)
    """width of both towers"""
    num_layers: int = Field(3, ge=1)
    """layers of both towers"""
    num_heads: int = Field(4, ge=1)
    """attention heads of both towers"""
    patch_size: int = Field(8, ge=1)
    """side of the image tower's patches, in pixels"""

    def architecture(self, image_size: int) -> dict[str, Any]:
        """open_clip's `model_cfg` for images of this side; ValueError when heads or patches do not divide the sizes."""
        if self.width % self.num_heads:
            raise ValueError(f"clip.num_heads {self.num_heads} does not divide clip.width {self.width}: change one")
        if image_size % self.patch_size:
            raise ValueError(f"clip.patch_size {self.patch_size} must divide data.resolution {image_size}: change one")
        vision = {"image_size": image_size, "patch_size": self.patch_size, "head_width": self.width // self.num_heads}
        both = {"width": self.width, "layers": self.num_layers}
        text = {"context_length": self.context_length, "vocab_size": 49408, "heads": self.num_heads}
        return {"embed_dim": self.embed_dim, "vision_cfg": vision | both, "text_cfg": text | both}


class CLIP(nn.Module):
    """An open_clip model for images in [-1, 1], which returns the features that its loss needs."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        import open_clip  # slow, and `CLIPConfig` does without

        super().__init__()

        self.architecture = architecture
        self.model = open_clip.CLIP(**architecture, output_dict=True)
        self.tokenizer = Tokenizer(architecture["text_cfg"]["context_length"])

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """(b, 1 or 3, h, w) and (b, length) -> image_features, text_features (b, embed_dim), logit_scale."""
        return self.model(images.expand(-1, 3, -1, -1), ids)

    def save(self, folder: Path) -> None:
        """Write a folder that open_clip loads as `local-dir:FOLDER`."""
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
        config = {"model_cfg": self.architecture, "preprocess_cfg": preprocess}
        write_text(folder / CONFIG_NAME, json.dumps(config, indent=2))
        save_weights(self.model, folder / WEIGHTS_NAME)


@torch.no_grad()
def retrieval_accuracy(model: CLIP, images: Tensor, captions: list[str]) -> float:
    """Fraction of captions whose own image, of images (b, c, h, w), is the nearest."""
    features = model(images, model.tokenizer(captions).to(images.device))
    similarity = F.normalize(features["text_features"], dim=1) @ F.normalize(features["image_features"], dim=1).T
    return (similarity.argmax(1).cpu() == torch.arange(len(captions))).float().mean().item()
