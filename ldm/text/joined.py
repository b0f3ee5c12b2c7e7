"""Two frozen text towers side by side, as Stable Diffusion XL has them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.text.encoder import TextEncoder, TextStates


def joined(encoders: Sequence[TextEncoder]) -> "TextEncoder | JoinedEncoder | None":
    """What conditions a U-Net: none, one tower, or two side by side."""
    return JoinedEncoder(*encoders) if len(encoders) == 2 else next(iter(encoders), None)


class JoinedEncoder(nn.Module):
    """The token states of both towers joined along their width, and the pooled vectors of those that give one."""

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        super().__init__()
        if first.tower.length != second.tower.length:
            raise ValueError(
                f"the text towers take {first.tower.length} and {second.tower.length} tokens: choose two with one limit"
            )
        if (first.config.padding is None) != (second.config.padding is None):
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
    def vector_width(self) -> int:
        """Width of the pooled vector that the U-Net gets; 0 when it gets none."""
        return self.first.vector_width + self.second.vector_width

    def forward(self, prompts: list[str]) -> TextStates:
        """As `TextEncoder` does, with both."""
        return self._joined(self.first(prompts), self.second(prompts))

    def id_states(self, ids: Tensor) -> TextStates:
        """As `TextEncoder` does, with both, whose tokenizer is the same."""
        return self._joined(self.first.id_states(ids), self.second.id_states(ids))

    @property
    def tokenizer(self) -> Any:
        """That of both."""
        return self.first.tokenizer

    def tokenize(self, prompts: list[str]) -> Tensor:
        """As `TextEncoder` does."""
        return self.first.tokenize(prompts)

    def prompt_states(self, prompts: list[str]) -> TextStates:
        """As `TextEncoder` does, with both."""
        return self._joined(self.first.prompt_states(prompts), self.second.prompt_states(prompts))

    def _joined(self, first: TextStates, second: TextStates) -> TextStates:
        given = [s.pooled for s, e in zip((first, second), self.encoders, strict=True) if e.config.pooled]
        pooled = torch.cat(given, dim=-1) if given else second.pooled
        return TextStates(torch.cat([first.tokens, second.tokens], dim=-1), first.mask, pooled)
