"""From prompts to the embeddings that condition the U-Net."""

from ldm.text.cache import encode_for_cache, states_from_cache
from ldm.text.config import TextConfig
from ldm.text.dual import DualTextEncoder, combine_encoders, load_text_encoder
from ldm.text.encoder import TextConditioner, TextEncoder
from ldm.text.tower import TextEmbeddings

__all__ = [
    "DualTextEncoder",
    "TextConditioner",
    "TextConfig",
    "TextEmbeddings",
    "TextEncoder",
    "combine_encoders",
    "encode_for_cache",
    "load_text_encoder",
    "states_from_cache",
]
