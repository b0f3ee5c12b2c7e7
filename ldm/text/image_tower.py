"""The image half of a CLIP: open_clip's own network, frozen, for distances."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.io.tensors import load_strict, read_tensors
from ldm.text.weights import find_tower

# What open_clip takes where a tower names nothing else.
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_BLOCKS = 4  # whose features are compared


class ImageTower(nn.Module):
    """Images (b, 3, h, w) in [-1, 1] -> what some of its blocks see in them, a list of (b, c, h', w')."""

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: dict[str, Any], preprocess: dict[str, Any]) -> None:
        from open_clip.model import _build_vision_tower  # slow to import

        super().__init__()
        self.visual = _build_vision_tower(cfg["embed_dim"], cfg["vision_cfg"], cfg.get("quick_gelu", False))
        size = self.visual.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        timm = getattr(self.visual, "trunk", None)
        layers = len(timm.feature_info) if timm else cfg["vision_cfg"].get("layers", 12)
        count = layers if isinstance(layers, int) else 1 + len(layers)
        self.blocks = sorted({round((i + 1) * count / MAX_BLOCKS) - 1 for i in range(MAX_BLOCKS)} - {-1})
        for name, default in (("mean", OPENAI_MEAN), ("std", OPENAI_STD)):
            values = torch.tensor(preprocess.get(name) or default).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, model_id: str, pretrained: str | None = None) -> "ImageTower":
        """That of a CLIP by `local-dir:FOLDER`, `hf-hub:ORG/NAME`, or an open_clip name and tag.

        ValueError: it is not there, a failed download, a damaged file, or a CLIP without images.
        """
        cfg, preprocess, path = find_tower(model_id, pretrained, kind="image")
        tensors = read_tensors(path, pickles=True)
        own = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
        if not own:
            raise ValueError(f"image tower {model_id} has no weights in {path}: pass a CLIP with both towers")
        tower = cls(cfg, preprocess)
        load_strict(tower.visual, own, path)
        return tower

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.shape[-2:] != self.size:  # which also changes their shape
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        images = ((images + 1) / 2 - self.mean) / self.std
        result = self.visual.forward_intermediates(images, self.blocks, intermediates_only=True)
        return list(result["image_intermediates"])
