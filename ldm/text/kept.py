"""Text states that are computed once and kept: what a tower says of ids, whole, and what the U-Net needs of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.text.encoder import TextEncoder, TextStates
from ldm.text.joined import JoinedEncoder


def keep(text: TextEncoder | JoinedEncoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token states (b, limit, width) of ids (b, limit), with zeros after the end of each prompt, and pooled vectors."""
    states = text.id_states(ids)
    tokens = states.tokens if states.mask is None else states.tokens * states.mask[..., None]
    return F.pad(tokens, (0, 0, 0, ids.shape[1] - tokens.shape[1])), states.pooled


def kept(text: TextEncoder | JoinedEncoder, ids: Tensor, tokens: Tensor, pooled: Tensor) -> TextStates:
    """The states that `id_states` would give for ids (b, limit), from what `keep` gave."""
    if text.encoders[0].config.padding is not None:
        return TextStates(tokens, None, pooled)
    end = ids.argmax(dim=1, keepdim=True).to(tokens.device)
    length = int(end.max()) + 1
    return TextStates(tokens[:, :length], torch.arange(length, device=tokens.device) <= end, pooled)
