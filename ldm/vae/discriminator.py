"""The patch discriminator (Isola et al. 2017, section 3.2), its hinge loss, and the weight of the adversarial loss."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ldm.config import Config
from ldm.layers import GroupNorm, check_group_norm


class DiscriminatorConfig(Config):
    """The defaults judge patches of 70 pixels; two layers judge 34, one judges 16."""

    base_channels: int = Field(64, ge=1)
    """width of the first layer; each further one is twice as wide, up to eight times"""
    num_layers: int = Field(3, ge=1)
    """layers of stride 2"""
    norm_num_groups: int = Field(32, ge=1)
    """groups of each GroupNorm"""
    learning_rate: float = Field(2e-4, gt=0)
    """at its peak, with the schedule of the run"""

    @model_validator(mode="after")
    def _check(self) -> "DiscriminatorConfig":
        check_group_norm(dict.fromkeys(self.widths[1:], self.norm_num_groups), widths="base_channels x 2, x 4, x 8")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each layer but the last, which has one."""
        return tuple(self.base_channels * min(2**i, 8) for i in range(self.num_layers + 1))

    @property
    def smallest_side(self) -> int:
        """Of an image, in pixels: at least one patch has a score."""
        return 3 * 2**self.num_layers


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: images (b, c, h, w) -> (b, 1, h', w') logits, high for real ones.

    The norm is GroupNorm, as a BatchNorm would see other samples on each rank and in each micro-batch.
    """

    def __init__(self, config: DiscriminatorConfig, image_channels: int) -> None:
        super().__init__()
        first, *widths = config.widths
        self.conv_in = nn.Conv2d(image_channels, first, 4, stride=2, padding=1)
        self.layers = nn.ModuleList()
        for index, width in enumerate(widths):
            stride = 2 if index < config.num_layers - 1 else 1
            conv = nn.Conv2d(first, width, 4, stride=stride, padding=1)
            self.layers.append(nn.Sequential(conv, GroupNorm(config.norm_num_groups, width), nn.LeakyReLU(0.2)))
            first = width
        # Without a bias: while all logits are within the hinge's margin its gradient is 0 but for rounding, which Adam
        # would turn into steps of full size.
        self.conv_out = nn.Conv2d(first, 1, 4, padding=1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv_in(images), 0.2)
        for layer in self.layers:
            h = layer(h)
        return self.conv_out(h).float()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, of logits (Lim and Ye 2017; equation 3 of Miyato et al. 2018)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(gradients: Tensor, *, largest: float) -> Tensor:
    """Ratio of the norms of two gradients (2, n) of the last layer: of the reconstruction, of the adversarial loss.

    Source: equation 7 of Esser et al. 2021. With it both losses move that layer equally.
    """
    reconstruction, adversarial = gradients.norm(dim=1)
    return (reconstruction / adversarial.clamp_min(1e-12)).clamp(max=largest)


@contextmanager
def used_weights(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The weights with which a layer is called inside the `with`: whole ones, also where they are sharded."""
    weights: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, *_: weights.append(module.weight))
    try:
        yield weights
    finally:
        handle.remove()


def last_layer_gradients(losses: list[Tensor], weight: Tensor) -> Tensor:
    """The gradient of each loss, as rows (losses, numbers of the weight), float32; the graph stays."""
    rows = [torch.autograd.grad(loss, weight, retain_graph=True)[0].float().flatten() for loss in losses]
    return torch.stack(rows)
