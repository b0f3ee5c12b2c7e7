"""A frozen text tower with its tokenizer: prompts -> embeddings."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from ldm.config import Config
from ldm.io.atomic import atomic_write, write_tensors, write_text
from ldm.io.tensors import to_device
from ldm.text.prompt_weights import parse_weights
from ldm.text.tokenizer import Tokenizer
from ldm.text.tower import TextEmbeddings, TextTower
from ldm.text.weights import (
    CONFIG_NAME,
    CONVERTED,
    LOCAL,
    WEIGHTS_NAME,
    load_tower,
    public_architecture,
    tower_tensors,
)

MAX_PROMPT_CHUNKS = 20


class TextConfig(Config):
    """Which tower to load, and which of its outputs condition the U-Net."""

    model: str = "latest"
    """`local-dir:FOLDER`, an open_clip name such as ViT-H-14, `hf-hub:ORG/NAME`; `latest`: the newest finished
    train_clip run in the folder of this run; `none`: no text"""
    pretrained: str | None = None
    """open_clip's tag of the weights, such as laion2b_s32b_b79k, when `model` is an open_clip name"""
    layer: Literal["last", "penultimate"] = "last"
    """whose hidden states condition the U-Net; penultimate in Stable Diffusion 2"""
    final_layer_norm: bool = True
    """apply the tower's final layer norm to the hidden states; not in Stable Diffusion XL"""
    pad_token_id: int | None = Field(None, ge=0)
    """pad prompts to the context length with this token, which the U-Net attends to, as in Stable Diffusion: 49407 in
    1, 0 in 2; left out, padding is masked"""
    use_pooled: bool = False
    """also condition on the pooled embedding, added to the time embedding"""
    zero_empty_prompt: bool = False
    """encode the empty prompt as zeros (Stable Diffusion XL) instead of running the tower"""

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the embeddings, apart from the weights."""
        return self.model_dump(exclude={"model", "pretrained"})


class TextEncoder(nn.Module):
    """One tower, without gradients."""

    def __init__(self, tower: TextTower, config: TextConfig, *, model_id: str, weights: Path) -> None:
        super().__init__()
        self.tower, self.config = tower, config
        self.tokenizer = Tokenizer(tower.length, **(tower.cfg["text_cfg"].get("tokenizer_kwargs") or {}))
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
        return cls(tower, config, model_id=model_id, weights=weights)

    @classmethod
    def random(cls, config: TextConfig, cfg: dict[str, Any] | None = None) -> "TextEncoder":
        """A tower of open_clip's `model_cfg`, by default that of `config.model`, with random weights, to measure."""
        tower = TextTower(cfg or public_architecture(config.model))
        for parameter in tower.parameters():
            nn.init.normal_(parameter, std=0.02)
        encoder = cls(tower, config, model_id="random", weights=Path())
        encoder.trim = False  # so that no shape depends on a number: a dry run has none
        return encoder

    @property
    def is_stored(self) -> bool:
        """Whether a model folder holds the weights of this tower; of a public one it holds the name."""
        return self.model_id == CONVERTED or self.model_id.startswith(LOCAL)

    def save(self, folder: Path) -> str:
        """Write the tower to `folder`, unless it is a public one; returns the `TextConfig.model` that names it."""
        if self.model_id == CONVERTED:
            write_text(folder / CONFIG_NAME, json.dumps({"model_cfg": self.tower.cfg}, indent=2))
            write_tensors(folder / WEIGHTS_NAME, tower_tensors(self.tower))
        elif self.is_stored:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                source, target = Path(self.model_id.removeprefix(LOCAL)) / name, folder / name
                if not target.exists() or not source.samefile(target):
                    with atomic_write(target) as tmp_path:
                        shutil.copyfile(source, tmp_path)
        else:
            return self.model_id
        return LOCAL + folder.name

    @torch.no_grad()
    def prune(self, words: Iterable[str]) -> None:
        """Zero the embeddings of all tokens but those of these words, single characters, punctuation, `'s` and such."""
        tokens = ((text.removesuffix("</w>"), token) for text, token in self.tokenizer.encoder.items())
        used = {token for text, token in tokens if len(text) == 1 or (text.isascii() and not text[0].isalnum())}
        used.update(token for word in words for token in self.tokenizer.encode(word))
        used.add(self.config.pad_token_id or 0)
        self.tower.token_ids = ids = torch.tensor(sorted(used))
        embedding = self.tower.token_embedding.weight
        embedding.copy_(torch.zeros_like(embedding).index_copy(0, ids, embedding[ids]))

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> TextEmbeddings:
        """Encode ids (b, context_length) on the CPU, as training does: trimmed and masked, or with `pad_token_id`."""
        end = self.find_end(ids)[:, None]  # of ids on the CPU, so the length is known without the device
        if self.config.pad_token_id is None:
            ids = ids[:, : int(end.max()) + 1] if self.trim else ids
        else:
            ids = torch.where(torch.arange(ids.shape[1]) > end, self.config.pad_token_id, ids)
        return self._zero_empty(self._embed(ids), end[:, 0] > 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> TextEmbeddings:
        """Encode prompts as a user writes them: parts may be weighted, and there is no limit of tokens.

        Tokens over the limit are encoded as further chunks, whose hidden states follow those of the first. A weight
        multiplies the hidden states of its tokens; the pooled embedding is that of the first chunk, without weights.
        ValueError: see `parse_weights`; a special token in a prompt; more than 20 chunks.
        """
        chunks = [self._chunks(prompt) for prompt in prompts]
        count = max(map(len, chunks))
        start, end = (self.tokenizer.sot_token_id, 1.0), (self.tokenizer.eot_token_id, 1.0)
        rows = [[start, *chunk, end] for own in chunks for chunk in own + [[]] * (count - len(own))]
        length = max(map(len, rows)) if self.config.pad_token_id is None else self.tower.length
        padding = (self.config.pad_token_id or 0, 1.0)
        padded = torch.tensor([row + [padding] * (length - len(row)) for row in rows])  # ids are exact in float32
        ids, weights = padded.unbind(-1)
        hidden_states, mask, pooled = self._embed(ids.long())
        hidden_states = hidden_states * to_device(weights, self._device)[..., None]
        if mask is not None:
            used = torch.tensor([i < len(own) for own in chunks for i in range(count)])
            mask = rearrange(mask & to_device(used, self._device)[:, None], "(b n) l -> b (n l)", n=count)
        hidden_states = rearrange(hidden_states, "(b n) l w -> b (n l) w", n=count)
        nonempty = torch.tensor([bool(prompt.strip()) for prompt in prompts])
        return self._zero_empty(TextEmbeddings(hidden_states, mask, pooled[::count]), nonempty)

    def find_end(self, ids: Tensor) -> Tensor:
        """The position of the end token in each row of ids (b, n): (b,)."""
        return (ids == self.tokenizer.eot_token_id).int().argmax(dim=1)

    @property
    def _device(self) -> torch.device:
        return self.tower.positional_embedding.device

    def _embed(self, ids: Tensor) -> TextEmbeddings:
        """The tower's embeddings of ids (b, n), as the configuration asks for them."""
        embeddings = self.tower(
            to_device(ids, self._device),
            end_token_id=self.tokenizer.eot_token_id,
            layer=self.config.layer,
            final_layer_norm=self.config.final_layer_norm,
        )
        return embeddings if self.config.pad_token_id is None else embeddings._replace(mask=None)

    def _zero_empty(self, embeddings: TextEmbeddings, nonempty: Tensor) -> TextEmbeddings:
        """Zeros where the prompt is not `nonempty` (b,), with `zero_empty_prompt`."""
        if not self.config.zero_empty_prompt:
            return embeddings
        factor = to_device(nonempty.to(embeddings.pooled.dtype), self._device)
        hidden_states, mask, pooled = embeddings
        return TextEmbeddings(hidden_states * factor[:, None, None], mask, pooled * factor[:, None])

    def _chunks(self, prompt: str) -> list[list[tuple[int, float]]]:
        """Tokens of a prompt and their weights, as many as the tower has room for; one empty chunk for no words."""
        room = self.tower.length - 2
        tokens = [(token, part.weight) for part in parse_weights(prompt) for token in self.tokenizer.encode(part.text)]
        for special in (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id):  # written so, or as &lt;...&gt;
            if any(token == special for token, _ in tokens):
                raise ValueError(f"prompt contains the special token {self.tokenizer.decoder[special]}: leave it out")
        if len(tokens) > (limit := MAX_PROMPT_CHUNKS * room):
            raise ValueError(f"prompt has {len(tokens):,} tokens, at most {limit:,} are allowed: shorten it")
        return [tokens[i : i + room] for i in range(0, len(tokens), room)] or [[]]
