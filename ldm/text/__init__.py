"""From prompts to the numbers that condition the U-Net."""

from ldm.text.encoder import TextConfig, TextEncoder, TextStates

__all__ = ["TextConfig", "TextEncoder", "TextStates"]
