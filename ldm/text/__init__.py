"""From prompts to the numbers that condition the U-Net."""

from ldm.text.cache import encode_for_cache, states_from_cache
from ldm.text.config import TextConfig
from ldm.text.dual import DualTextEncoder, combine_encoders
from ldm.text.encoder import TextEncoder
from ldm.text.tower import TextEmbeddings

Text = TextEncoder | DualTextEncoder

__all__ = [
    "DualTextEncoder",
    "Text",
    "TextConfig",
    "TextEmbeddings",
    "TextEncoder",
    "combine_encoders",
    "encode_for_cache",
    "states_from_cache",
]
