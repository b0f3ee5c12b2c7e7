"""The network that learns to undo noise."""

from ldm.unet.blocks import CachedContext
from ldm.unet.model import UNet, UNetConfig

__all__ = ["CachedContext", "UNet", "UNetConfig"]
