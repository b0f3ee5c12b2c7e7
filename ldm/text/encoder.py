"""A frozen OpenCLIP text tower: prompts -> token states, mask and pooled vector."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.io.atomic import atomic_write, write_tensors, write_text
from ldm.text.config import CONVERTED, LOCAL, TextConfig
from ldm.text.prompt_weights import parse_weights
from ldm.text.tokenizer import make_tokenizer
from ldm.text.tower import TextEmbeddings, TextTower
from ldm.text.weights import CONFIG_NAME, WEIGHTS_NAME, _check_supported, _load_weights, _resolve_weights

MAX_PROMPT_CHUNKS = 20  # of a long prompt, at most


class TextEncoder(nn.Module):
    """Tokenizer and frozen tower: always in eval mode, without gradients."""

    def __init__(self, tower: TextTower, tokenizer: Any, config: TextConfig, *, model_id: str, weights: Path) -> None:
        super().__init__()
        self.tower, self.tokenizer, self.config = tower, tokenizer, config
        self.model_id, self.weights = model_id, weights  # how it is named, and the file it was read from
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, config: TextConfig, *, model_id: str | None = None) -> "TextEncoder":
        """Build the tower that `config` names and load its weights; ValueError when there are none."""
        model_id = model_id or config.model
        try:
            cfg, weights = _resolve_weights(model_id, config.pretrained)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"text tower {model_id} can not be fetched ({reason}); is the hub reached, or name a `local-dir:FOLDER`"
            ) from None
        _check_supported(cfg, model_id)
        with torch.device("meta"):
            tower = TextTower(cfg)
        _load_weights(tower, weights, model_id)
        text = cfg["text_cfg"]
        tokenizer = make_tokenizer(tower.length, **(text.get("tokenizer_kwargs") or {}))
        return cls(tower, tokenizer, config, model_id=model_id, weights=weights)

    @property
    def encoders(self) -> tuple["TextEncoder", ...]:
        """This one, as there is no other."""
        return (self,)

    @property
    def width(self) -> int:
        """Width of the token states."""
        return self.tower.positional_embedding.shape[1]

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vector that the U-Net gets; 0 when it gets none."""
        return self.tower.text_projection.shape[1] if self.config.use_pooled else 0

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in eval mode, whatever the model around does."""
        return super().train(False)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> (b, length) ids. A prompt over the limit is cut, and the log says where."""
        return self.tokenizer(prompts)

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> TextEmbeddings:
        """Encode prompts, up to the end of the longest; what follows an end token is masked and changes nothing.

        With `padding` they are filled up to the limit instead, and there is no mask.
        """
        return self.encode_ids(self.tokenize(prompts))

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> TextEmbeddings:
        """The same for the ids (b, length) that `tokenize` gave."""
        end = ids.argmax(dim=1, keepdim=True)
        if self.config.pad_token_id is None:
            ids = ids[:, : int(end.max()) + 1]
        else:
            ids = torch.where(torch.arange(ids.shape[1], device=ids.device) > end, self.config.pad_token_id, ids)
        return self._zero_empty(self._states(ids.to(self._device)), end[:, 0] > 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> TextEmbeddings:
        """Encode prompts as a person writes them: parts may be weighted, and there is no limit of tokens.

        What is over the limit is encoded by itself, and its states follow the others. A weight multiplies the states
        of its tokens; the pooled vector is that of the first piece, without weights. ValueError: see `parse`; a prompt
        of more than 20 pieces.
        """
        pieces = [self._chunks(prompt) for prompt in prompts]
        count = max(map(len, pieces))
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        filled = [own + [[]] * (count - len(own)) for own in pieces]
        rows = [[(start, 1.0), *piece, (end, 1.0)] for own in filled for piece in own]
        length = max(map(len, rows)) if self.config.pad_token_id is None else self.tower.length
        padded = [row + [(self.config.pad_token_id or 0, 1.0)] * (length - len(row)) for row in rows]
        ids, weights = torch.tensor(padded, dtype=torch.float64).to(self._device, torch.float32).unbind(-1)
        states = self._states(ids.long())
        tokens = rearrange(states.hidden_states * weights[..., None], "(b n) l w -> b (n l) w", n=count)
        mask = None
        if states.mask is not None:
            used = torch.tensor([i < len(own) for own in pieces for i in range(count)], device=self._device)
            mask = rearrange(states.mask & used[:, None], "(b n) l -> b (n l)", n=count)
        said = torch.tensor([bool(prompt.strip()) for prompt in prompts])
        return self._zero_empty(TextEmbeddings(tokens, mask, states.pooled[::count]), said)

    @property
    def _device(self) -> torch.device:
        return self.tower.positional_embedding.device

    def _states(self, ids: Tensor) -> TextEmbeddings:
        """What the tower says of ids (b, length), as this configuration wants it."""
        states = self.tower(ids, layer=self.config.layer, normalize=self.config.final_layer_norm)
        return states if self.config.pad_token_id is None else states._replace(mask=None)

    def _zero_empty(self, states: TextEmbeddings, said: Tensor) -> TextEmbeddings:
        """With zeros where nothing is `said` (b,), if this configuration wants it."""
        if not self.config.zero_empty_prompt:
            return states
        said = said.to(states.hidden_states)
        return states._replace(
            hidden_states=states.hidden_states * said[:, None, None], pooled=states.pooled * said[:, None]
        )

    def _chunks(self, prompt: str) -> list[list[tuple[int, float]]]:
        """(token, weight) of a prompt, as many at a time as the tower has room for; one empty piece for no words."""
        room = self.tower.length - 2
        tokens = [
            (token, part.weight) for part in parse_weights(prompt) for token in self.tokenizer.encode_all(part.text)
        ]
        for sign in (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id):  # as it was written, or as &lt;...&gt;
            if any(token == sign for token, _ in tokens):
                name = self.tokenizer.decoder[sign]
                raise ValueError(f"prompt has {name} in it, which the text tower takes for its own sign: leave it out")
        if len(tokens) > MAX_PROMPT_CHUNKS * room:
            raise ValueError(
                f"prompt has {len(tokens):,} tokens, at most {MAX_PROMPT_CHUNKS * room:,} can be read: shorten it"
            )
        return [tokens[i : i + room] for i in range(0, len(tokens), room)] or [[]]

    def save(self, folder: Path) -> str:
        """Write a local or converted tower to `folder` and return how to name it there; a public one is only named."""
        if self.model_id == CONVERTED:
            write_text(folder / CONFIG_NAME, json.dumps({"model_cfg": self.tower.cfg}, indent=2))
            write_tensors(folder / WEIGHTS_NAME, self.tower.state_dict())
            return LOCAL + folder.name
        if not self.model_id.startswith(LOCAL):
            return self.model_id
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            origin = Path(self.model_id.removeprefix(LOCAL)) / name
            if not (folder / name).exists() or not origin.samefile(folder / name):
                with atomic_write(folder / name) as beside:
                    shutil.copyfile(origin, beside)
        return LOCAL + folder.name
