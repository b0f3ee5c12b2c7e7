"""The network that learns to undo noise."""

from ldm.unet.model import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig"]
