"""Fixed-length text embeddings for caching, and how to turn them back into a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.text.encoder import TextConditioner
from ldm.text.tower import TextEmbeddings, to_device


def encode_for_cache(text: TextConditioner, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (b, context_length) on the CPU -> hidden states (b, context_length, width), pooled (b, embed_dim).

    The hidden states are zero after the end of each prompt, unless prompts are padded.
    """
    embeddings = text.encode_ids(ids)
    hidden_states, mask = embeddings.hidden_states, embeddings.mask
    if mask is not None:
        hidden_states = hidden_states * mask[..., None]
    return F.pad(hidden_states, (0, 0, 0, ids.shape[1] - hidden_states.shape[1])), embeddings.pooled


def states_from_cache(text: TextConditioner, ids: Tensor, hidden_states: Tensor, pooled: Tensor) -> TextEmbeddings:
    """What `encode_ids` would give for ids (b, context_length) on the CPU, from the output of `encode_for_cache`.

    `hidden_states` and `pooled` may be on any device; nothing waits for it.
    """
    if text.encoders[0].config.pad_token_id is not None:
        return TextEmbeddings(hidden_states, None, pooled)
    end = ids.argmax(dim=1, keepdim=True)
    length = int(end.max()) + 1
    mask = to_device(torch.arange(length) <= end, hidden_states.device)
    return TextEmbeddings(hidden_states[:, :length], mask, pooled)
