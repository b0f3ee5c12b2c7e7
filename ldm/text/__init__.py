"""From prompts to the embeddings that condition the U-Net."""

from ldm.text.conditioner import TextConditioner, combine_encoders, load_text_encoder
from ldm.text.encoder import TextConfig, TextEncoder
from ldm.text.tower import TextEmbeddings

__all__ = ["TextConditioner", "TextConfig", "TextEmbeddings", "TextEncoder", "combine_encoders", "load_text_encoder"]
