"""Perceptual distances: images are compared by the features that a frozen network sees in them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.io.tensors import load_strict, read_tensors

# Outputs of torchvision's VGG16 that LPIPS compares: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, and their channels.
VGG_CHANNELS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
VGG_MEAN, VGG_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1], by LPIPS' scaling layer


class FeatureDistance(nn.Module):
    """Distance by the features of a network `features`, images (b, 3, h, w) -> a list of (b, c, h', w').

    Each feature vector gets length 1, so each term is 2 - 2 cosine: a mean over positions and over the list.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of images (b, 1 or 3, h, w) in [-1, 1], with a gradient for both."""
        pairs = zip(*(self.features(images.expand(-1, 3, -1, -1)) for images in (x, y)), strict=True)
        return torch.stack([_squares(a, b).sum(1).mean() for a, b in pairs]).mean()


class LPIPS(nn.Module):
    """LPIPS with VGG16 (Zhang et al. 2018, equation 1), from the two files of its weights."""

    smallest_side = 16  # of an image, in pixels: VGG16 halves it four times
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        from torchvision.models.vgg import cfgs, make_layers  # slow to import

        super().__init__()
        self.vgg = make_layers(cfgs["D"])[: max(VGG_CHANNELS) + 1]  # VGG16 without what classifies
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in VGG_CHANNELS.values())
        self.register_buffer("mean", torch.tensor(VGG_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(VGG_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, vgg: Path, heads: Path) -> "LPIPS":
        """From torchvision's VGG16 (vgg16-397923af.pth) and LPIPS' linear layers (vgg.pth); ValueError: others."""
        if missing := [str(file) for file in (vgg, heads) if not file.is_file()]:
            raise ValueError(f"loss.lpips_files: there is no {missing[0]}: download it, or choose other features")
        network, wanted = cls(), "features."
        tensors = read_tensors(vgg, pickles=True)
        own = {name.removeprefix(wanted): t for name, t in tensors.items() if name.startswith(wanted)}
        load_strict(network.vgg, own, vgg)
        linear = read_tensors(heads, pickles=True)
        load_strict(network.heads, {n.removeprefix("lin").replace("model.1.", ""): t for n, t in linear.items()}, heads)
        return network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of images (b, 1 or 3, h, w) in [-1, 1], with a gradient for both."""
        pairs = zip(*(self._features(images.expand(-1, 3, -1, -1)) for images in (x, y)), strict=True)
        weights = (head.get_parameter("weight") for head in self.heads)  # not convolutions: autocast rounds those
        terms = [(w * _squares(a, b)).sum(1).mean() for w, (a, b) in zip(weights, pairs, strict=True)]
        return torch.stack(terms).sum()

    def _features(self, images: Tensor) -> Sequence[Tensor]:
        h, found = (images - self.mean) / self.std, []
        for index, layer in enumerate(self.vgg):
            h = layer(h)
            if index in VGG_CHANNELS:
                found.append(h)
        return found


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared differences of feature vectors of length 1: (b, c, h, w). Its gradient is finite where features are 0."""
    a, b = (x.float() * torch.rsqrt(x.float().square().sum(1, keepdim=True) + 1e-10) for x in (a, b))
    return (a - b).square()
