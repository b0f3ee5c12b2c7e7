"""From text and sizes to the `Conditioning` of a U-Net."""

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.text import TextConditioner, TextEmbeddings


def text_conditioning(text: TextConditioner, embeddings: TextEmbeddings) -> Conditioning:
    """Hidden states, their mask, and the pooled vector of towers whose configuration uses it."""
    return Conditioning(embeddings.hidden_states, embeddings.mask, embeddings.pooled if text.pooled_dim else None)


def prompt_conditioning(text: TextConditioner | None, prompts: list[str], *, literal: bool) -> Conditioning:
    """Encode prompts; `literal` ones are captions, read as in training: without weights, and cut at the limit."""
    if text is None:
        return Conditioning()
    return text_conditioning(text, text(prompts) if literal else text.encode_prompts(prompts))


def uncropped_size(width: int, height: int, device: torch.device) -> Tensor:
    """Sizes (1, 6) of an image that was not cropped: original height and width, crop top and left, height and width."""
    return torch.tensor([[height, width, 0, 0, height, width]], device=device)
