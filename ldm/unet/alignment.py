"""Alignment, in training: features of the U-Net follow those that an image tower has of the image (Yu et al. 2025)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.unet.model import UNet


class AlignedUNet(nn.Module):
    """A U-Net in training, with a projection of the features after its middle to the width of an image tower's.

    In the middle as in U-REPA (Tian et al. 2025): there a U-Net has decided what the image shows.
    """

    cpu_layout = UNet.cpu_layout

    def __init__(self, unet: UNet, width: int) -> None:
        super().__init__()
        self.unet = unet
        self.project = nn.Conv2d(unet.config.widths[-1], width, 1)

    def forward(self, z: Tensor, timestep: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """The prediction (b, in_channels, h, w), and the projected features (b, width, h / factor, w / factor)."""
        prediction, features = self.unet.with_features(z, timestep, cond)
        return prediction, self.project(features)


def alignment_distance(features: Tensor, target: Tensor) -> Tensor:
    """1 - cosine, a mean over the places of each item: (b, c, h, w) and (b, c, h', w'), which is pooled -> (b,)."""
    pooled = F.adaptive_avg_pool2d(target.float(), (features.shape[2], features.shape[3]))
    return (1 - F.cosine_similarity(features.float(), pooled, dim=1)).flatten(1).mean(1)
