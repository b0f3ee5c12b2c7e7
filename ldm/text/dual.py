"""Two frozen text towers side by side, as Stable Diffusion XL has them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.text.encoder import TextEncoder
from ldm.text.tower import TextEmbeddings


def combine_encoders(encoders: Sequence[TextEncoder]) -> "TextEncoder | DualTextEncoder | None":
    """What conditions a U-Net: none, one tower, or two side by side."""
    return DualTextEncoder(*encoders) if len(encoders) == 2 else next(iter(encoders), None)


class DualTextEncoder(nn.Module):
    """The token states of both towers joined along their width, and the pooled vectors of those that give one."""

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        super().__init__()
        if first.tower.length != second.tower.length:
            raise ValueError(
                f"the text towers take {first.tower.length} and {second.tower.length} tokens: choose two with one limit"
            )
        if (first.config.pad_token_id is None) != (second.config.pad_token_id is None):
            raise ValueError("set the padding of both text towers, or of none: their states must be of one length")
        self.first, self.second = first, second

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """Both, in order."""
        return self.first, self.second

    @property
    def width(self) -> int:
        """Width of the token states."""
        return self.first.width + self.second.width

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vector that the U-Net gets; 0 when it gets none."""
        return self.first.pooled_dim + self.second.pooled_dim

    def forward(self, prompts: list[str]) -> TextEmbeddings:
        """As `TextEncoder` does, with both."""
        return self._joined(self.first(prompts), self.second(prompts))

    def encode_ids(self, ids: Tensor) -> TextEmbeddings:
        """As `TextEncoder` does, with both, whose tokenizer is the same."""
        return self._joined(self.first.encode_ids(ids), self.second.encode_ids(ids))

    @property
    def tokenizer(self) -> Any:
        """That of both."""
        return self.first.tokenizer

    def tokenize(self, prompts: list[str]) -> Tensor:
        """As `TextEncoder` does."""
        return self.first.tokenize(prompts)

    def encode_prompts(self, prompts: list[str]) -> TextEmbeddings:
        """As `TextEncoder` does, with both."""
        return self._joined(self.first.encode_prompts(prompts), self.second.encode_prompts(prompts))

    def _joined(self, first: TextEmbeddings, second: TextEmbeddings) -> TextEmbeddings:
        given = [s.pooled for s, e in zip((first, second), self.encoders, strict=True) if e.config.use_pooled]
        pooled = torch.cat(given, dim=-1) if given else second.pooled
        return TextEmbeddings(torch.cat([first.hidden_states, second.hidden_states], dim=-1), first.mask, pooled)
