"""The network that learns to undo noise."""

from ldm.unet.blocks import KeptContext
from ldm.unet.model import UNet, UNetConfig

__all__ = ["KeptContext", "UNet", "UNetConfig"]
