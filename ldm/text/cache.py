"""Text states that are computed once and kept: what a tower says of ids, whole, and what the U-Net needs of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.text.dual import DualTextEncoder
from ldm.text.encoder import TextEncoder
from ldm.text.tower import TextEmbeddings


def encode_for_cache(text: TextEncoder | DualTextEncoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token states (b, limit, width) of ids (b, limit), with zeros after the end of each prompt, and pooled vectors."""
    states = text.encode_ids(ids)
    tokens = states.hidden_states if states.mask is None else states.hidden_states * states.mask[..., None]
    return F.pad(tokens, (0, 0, 0, ids.shape[1] - tokens.shape[1])), states.pooled


def states_from_cache(
    text: TextEncoder | DualTextEncoder, ids: Tensor, tokens: Tensor, pooled: Tensor
) -> TextEmbeddings:
    """The states that `id_states` would give for ids (b, limit), from what `keep` gave."""
    if text.encoders[0].config.pad_token_id is not None:
        return TextEmbeddings(tokens, None, pooled)
    end = ids.argmax(dim=1, keepdim=True).to(tokens.device)
    length = int(end.max()) + 1
    return TextEmbeddings(tokens[:, :length], torch.arange(length, device=tokens.device) <= end, pooled)
