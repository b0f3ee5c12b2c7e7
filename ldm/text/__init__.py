"""From prompts to the numbers that condition the U-Net."""

from ldm.text.encoder import TextConfig, TextEncoder, TextStates
from ldm.text.joined import JoinedEncoder, joined
from ldm.text.kept import keep, kept

Text = TextEncoder | JoinedEncoder

__all__ = ["JoinedEncoder", "Text", "TextConfig", "TextEncoder", "TextStates", "joined", "keep", "kept"]
