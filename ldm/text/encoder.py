"""A frozen text tower with its tokenizer: prompts -> embeddings."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.text.config import TextConfig
from ldm.text.prompt_weights import parse_weights
from ldm.text.tokenizer import Tokenizer
from ldm.text.tower import TextEmbeddings, TextTower, to_device
from ldm.text.weights import load_tower, save_tower

MAX_PROMPT_CHUNKS = 20
Chunk = list[tuple[int, float]]  # tokens of a prompt and their weights, as many as the tower has room for


class TextConditioner(nn.Module, ABC):
    """What conditions a U-Net on text: one frozen tower (`TextEncoder`), or two side by side (`DualTextEncoder`)."""

    tokenizer: Tokenizer
    width: int  # of the hidden states
    pooled_dim: int  # of the pooled embedding that the U-Net gets; 0 when it gets none

    @property
    @abstractmethod
    def encoders(self) -> tuple["TextEncoder", ...]:
        """The towers, in order."""

    @abstractmethod
    def encode_ids(self, ids: Tensor) -> TextEmbeddings:
        """Encode the ids (b, context_length) of `tokenize`, on the CPU, up to the end of the longest prompt.

        What follows an end token is masked and changes nothing. With `pad_token_id` prompts are padded to the context
        length instead, and there is no mask.
        """

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> TextEmbeddings:
        """Encode prompts as a user writes them: parts may be weighted, and there is no limit of tokens.

        Tokens over the limit are encoded as further chunks, whose hidden states follow those of the first. A weight
        multiplies the hidden states of its tokens; the pooled embedding is that of the first chunk, without weights.
        ValueError: see `parse_weights`; a special token in a prompt; more than 20 chunks.
        """

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> (b, context_length) ids on the CPU; a truncated prompt is logged."""
        return self.tokenizer(prompts)

    def forward(self, prompts: list[str]) -> TextEmbeddings:
        """Encode prompts as captions in training: truncated, and without weights."""
        return self.encode_ids(self.tokenize(prompts))


class TextEncoder(TextConditioner):
    """One tower, always in eval mode and without gradients."""

    def __init__(
        self, tower: TextTower, tokenizer: Tokenizer, config: TextConfig, *, model_id: str, weights: Path
    ) -> None:
        super().__init__()
        self.tower, self.tokenizer, self.config = tower, tokenizer, config
        self.model_id, self.weights = model_id, weights  # as `TextConfig.model` names it, and the file it came from
        self.trim = True  # the ids of a batch after the end of its longest prompt
        self.width = tower.positional_embedding.shape[1]
        self.pooled_dim = tower.text_projection.shape[1] if config.use_pooled else 0
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, config: TextConfig, *, model_id: str | None = None) -> "TextEncoder":
        """The tower of `config.model`, or of `model_id` in its place; ValueError: see `load_tower`."""
        model_id = model_id or config.model
        tower, weights = load_tower(model_id, config.pretrained)
        tokenizer = Tokenizer(tower.length, **(tower.cfg["text_cfg"].get("tokenizer_kwargs") or {}))
        return cls(tower, tokenizer, config, model_id=model_id, weights=weights)

    @classmethod
    def random(cls, config: TextConfig, cfg: dict[str, Any] | None = None) -> "TextEncoder":
        """A tower of open_clip's `model_cfg`, by default that of `config.model`, with random weights, to measure.

        Its prompts are not trimmed, so that no shape depends on a number: a dry run has none.
        """
        if cfg is None:
            import open_clip  # slow to import

            cfg = open_clip.get_model_config(config.model)
        tower = TextTower(cfg)
        for parameter in tower.parameters():
            nn.init.normal_(parameter, std=0.02)
        encoder = cls(tower, Tokenizer(tower.length), config, model_id="random", weights=Path())
        encoder.trim = False
        return encoder

    def save(self, folder: Path) -> str:
        """Write a local or converted tower to `folder`; returns the `TextConfig.model` that names it."""
        return save_tower(self.tower, self.model_id, folder)

    @property
    def encoders(self) -> tuple["TextEncoder", ...]:
        """This one alone."""
        return (self,)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in eval mode, whatever the mode of the module around."""
        return super().train(False)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> TextEmbeddings:
        """See `TextConditioner`."""
        end = ids.argmax(dim=1, keepdim=True)  # of ids on the CPU, so the length is known without the device
        if self.config.pad_token_id is None:
            ids = ids[:, : int(end.max()) + 1] if self.trim else ids
        else:
            ids = torch.where(torch.arange(ids.shape[1]) > end, self.config.pad_token_id, ids)
        return self._zero_empty(self._embed(ids), end[:, 0] > 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> TextEmbeddings:
        """See `TextConditioner`."""
        chunks = [self._chunks(prompt) for prompt in prompts]
        count = max(map(len, chunks))
        embeddings = self._embed_chunks([chunk for own in chunks for chunk in own + [[]] * (count - len(own))])
        hidden_states = rearrange(embeddings.hidden_states, "(b n) l w -> b (n l) w", n=count)
        mask = None
        if embeddings.mask is not None:
            used = torch.tensor([i < len(own) for own in chunks for i in range(count)])
            mask = embeddings.mask & to_device(used, self._device)[:, None]
            mask = rearrange(mask, "(b n) l -> b (n l)", n=count)
        nonempty = torch.tensor([bool(prompt.strip()) for prompt in prompts])
        return self._zero_empty(TextEmbeddings(hidden_states, mask, embeddings.pooled[::count]), nonempty)

    @property
    def _device(self) -> torch.device:
        return self.tower.positional_embedding.device

    def _embed(self, ids: Tensor) -> TextEmbeddings:
        """The tower's embeddings of ids (b, n), as the configuration asks for them."""
        layer, final_layer_norm = self.config.layer, self.config.final_layer_norm
        embeddings = self.tower(to_device(ids, self._device), layer=layer, final_layer_norm=final_layer_norm)
        return embeddings if self.config.pad_token_id is None else embeddings._replace(mask=None)

    def _embed_chunks(self, chunks: list[Chunk]) -> TextEmbeddings:
        """The embeddings of chunks between start and end token, hidden states times weights."""
        start, end = (self.tokenizer.sot_token_id, 1.0), (self.tokenizer.eot_token_id, 1.0)
        rows = [[start, *chunk, end] for chunk in chunks]
        length = max(map(len, rows)) if self.config.pad_token_id is None else self.tower.length
        padding = (self.config.pad_token_id or 0, 1.0)
        padded = torch.tensor([row + [padding] * (length - len(row)) for row in rows])  # ids are exact in float32
        ids, weights = padded.unbind(-1)
        embeddings = self._embed(ids.long())
        hidden_states = embeddings.hidden_states * to_device(weights, self._device)[..., None]
        return embeddings._replace(hidden_states=hidden_states)

    def _zero_empty(self, embeddings: TextEmbeddings, nonempty: Tensor) -> TextEmbeddings:
        """Zeros where the prompt is not `nonempty` (b,), with `zero_empty_prompt`."""
        if not self.config.zero_empty_prompt:
            return embeddings
        factor = to_device(nonempty.to(embeddings.pooled.dtype), self._device)
        return embeddings._replace(
            hidden_states=embeddings.hidden_states * factor[:, None, None], pooled=embeddings.pooled * factor[:, None]
        )

    def _chunks(self, prompt: str) -> list[Chunk]:
        """The tokens of a prompt and their weights, in chunks; one empty chunk for no words."""
        room = self.tower.length - 2
        tokens = [(token, part.weight) for part in parse_weights(prompt) for token in self.tokenizer.encode(part.text)]
        for special in (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id):  # written so, or as &lt;...&gt;
            if any(token == special for token, _ in tokens):
                raise ValueError(f"prompt contains the special token {self.tokenizer.decoder[special]}: leave it out")
        if len(tokens) > MAX_PROMPT_CHUNKS * room:
            raise ValueError(
                f"prompt has {len(tokens):,} tokens, at most {MAX_PROMPT_CHUNKS * room:,} are allowed: shorten it"
            )
        return [tokens[i : i + room] for i in range(0, len(tokens), room)] or [[]]
