"""Two frozen text towers side by side, as in Stable Diffusion XL, and the choice of none, one or two."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.io.model_dir import latest_model
from ldm.text.config import LOCAL, TextConfig
from ldm.text.encoder import TextConditioner, TextEncoder
from ldm.text.tower import TextEmbeddings


def load_text_encoder(towers: Sequence[TextConfig], runs_dir: Path, command: str) -> TextConditioner | None:
    """The frozen tower, or two; None where all are `none`. `latest` is the newest finished one below `runs_dir`.

    ValueError: see `TextEncoder.load`; no finished tower there, with the `command` that trains one.
    """
    encoders = []
    for config in towers:
        model_id = config.model
        if model_id == "latest":
            model_id = f"{LOCAL}{latest_model('text tower', runs_dir, script=command)}"
        if model_id != "none":
            encoders.append(TextEncoder.load(config, model_id=model_id))
    return combine_encoders(encoders)


def combine_encoders(encoders: Sequence[TextEncoder]) -> TextConditioner | None:
    """What conditions a U-Net: nothing, one tower, or two."""
    return DualTextEncoder(*encoders) if len(encoders) == 2 else next(iter(encoders), None)


class DualTextEncoder(TextConditioner):
    """The hidden states of two towers, concatenated by width, and the pooled embeddings of those that use it."""

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        super().__init__()
        lengths = first.tower.length, second.tower.length
        if lengths[0] != lengths[1]:
            raise ValueError(f"text towers have context lengths {lengths[0]} and {lengths[1]}: choose equal ones")
        if (first.config.pad_token_id is None) != (second.config.pad_token_id is None):
            raise ValueError("text towers must both have pad_token_id or neither: set it in text and second_text")
        self.first, self.second, self.tokenizer = first, second, first.tokenizer
        self.width, self.pooled_dim = first.width + second.width, first.pooled_dim + second.pooled_dim

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """Both, in order."""
        return self.first, self.second

    def encode_ids(self, ids: Tensor) -> TextEmbeddings:
        """See `TextConditioner`."""
        return self._concatenate(self.first.encode_ids(ids), self.second.encode_ids(ids))

    def encode_prompts(self, prompts: list[str]) -> TextEmbeddings:
        """See `TextConditioner`."""
        return self._concatenate(self.first.encode_prompts(prompts), self.second.encode_prompts(prompts))

    def _concatenate(self, first: TextEmbeddings, second: TextEmbeddings) -> TextEmbeddings:
        both = zip(self.encoders, (first, second), strict=True)
        pooled = [embeddings.pooled for encoder, embeddings in both if encoder.config.use_pooled] or [second.pooled]
        hidden_states = torch.cat([first.hidden_states, second.hidden_states], dim=-1)
        return TextEmbeddings(hidden_states, first.mask, torch.cat(pooled, dim=-1))
