"""What conditions a U-Net on text: one frozen tower, or two side by side as in Stable Diffusion XL."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import read_yaml, relative
from ldm.io.tensors import to_device
from ldm.text.clip import CLIPConfig
from ldm.text.encoder import TextConfig, TextEncoder
from ldm.text.tokenizer import Tokenizer
from ldm.text.tower import TextEmbeddings
from ldm.text.weights import HUB, LOCAL, latest_tower


class TextConditioner(nn.Module):
    """The hidden states of all towers, concatenated by width, and the pooled embeddings of those that use it."""

    def __init__(self, *encoders: TextEncoder) -> None:
        super().__init__()
        lengths = [encoder.tower.length for encoder in encoders]
        if len({*lengths}) > 1:
            raise ValueError(f"text towers have context lengths {' and '.join(map(str, lengths))}: choose equal ones")
        if len({encoder.config.pad_token_id is None for encoder in encoders}) > 1:
            raise ValueError("text towers must both have pad_token_id or neither: set it in text and second_text")
        self.towers = nn.ModuleList(encoders)
        self.tokenizer = encoders[0].tokenizer
        self.width = sum(encoder.width for encoder in encoders)  # of the hidden states
        self.pooled_dim = sum(encoder.pooled_dim for encoder in encoders)  # of what the U-Net gets; 0 when it gets none
        self.eval()

    @property
    def encoders(self) -> list[TextEncoder]:
        """The towers, in order."""
        return cast(list[TextEncoder], list(self.towers))

    def train(self, mode: bool = True) -> "TextConditioner":
        """Stay in eval mode, whatever the mode of the module around."""
        return super().train(False)

    def read_ahead(self, *splits: Iterable[str]) -> str:
        """Tokenize the captions of a training before it: what is lost of them, in lines; see `Tokenizer`."""
        pruned = [encoder.model_id for encoder in self.encoders if encoder.tower.token_ids is not None]
        lost = "it was pruned to the tokens of the captions of its own training, and takes no notice of others"
        lines = (self.tokenizer.read_ahead(*splits), *(f"warning: text tower {name}: {lost}" for name in pruned))
        return "\n".join(filter(None, lines))

    def forward(self, prompts: list[str]) -> TextEmbeddings:
        """Encode prompts as captions in training: truncated, and without weights."""
        return self.encode_ids(self.tokenizer(prompts))

    def encode_ids(self, ids: Tensor) -> TextEmbeddings:
        """See `TextEncoder`."""
        return self._concatenate([encoder.encode_ids(ids) for encoder in self.encoders])

    def encode_prompts(self, prompts: list[str]) -> TextEmbeddings:
        """See `TextEncoder`."""
        return self._concatenate([encoder.encode_prompts(prompts) for encoder in self.encoders])

    def encode_for_cache(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (b, context_length) on the CPU -> hidden states (b, context_length, width), pooled (b, embed_dim)."""
        hidden_states, mask, pooled = self.encode_ids(ids)
        if mask is not None:
            hidden_states = hidden_states * mask[..., None]  # zero after the end of each prompt
        return F.pad(hidden_states, (0, 0, 0, ids.shape[1] - hidden_states.shape[1])), pooled

    def states_from_cache(self, ids: Tensor, hidden_states: Tensor, pooled: Tensor) -> TextEmbeddings:
        """What `encode_ids` would give for ids (b, context_length) on the CPU, from what `encode_for_cache` gave."""
        if self.encoders[0].config.pad_token_id is not None:
            return TextEmbeddings(hidden_states, None, pooled)
        end = self.encoders[0].find_end(ids)[:, None]
        length = int(end.max()) + 1
        mask = to_device(torch.arange(length) <= end, hidden_states.device)
        return TextEmbeddings(hidden_states[:, :length], mask, pooled)

    def _concatenate(self, embeddings: list[TextEmbeddings]) -> TextEmbeddings:
        both = zip(self.encoders, embeddings, strict=True)
        pooled = [own.pooled for encoder, own in both if encoder.config.use_pooled] or [embeddings[-1].pooled]
        hidden_states = torch.cat([own.hidden_states for own in embeddings], dim=-1)
        return TextEmbeddings(hidden_states, embeddings[0].mask, torch.cat(pooled, dim=-1))


def combine_encoders(encoders: Sequence[TextEncoder]) -> TextConditioner | None:
    """What conditions a U-Net: nothing, one tower, or two."""
    return TextConditioner(*encoders) if encoders else None


def load_text_encoder(towers: Sequence[TextConfig], runs_dir: Path, command: str) -> TextConditioner | None:
    """The frozen towers, if any; `latest` is the newest in `runs_dir`, ValueError: none, run the `command` first."""
    encoders = []
    for config in towers:
        model_id = config.model
        if model_id == "latest":
            model_id = latest_tower(runs_dir, script=command)
        if model_id != "none":
            encoders.append(TextEncoder.load(config, model_id=model_id))
    return combine_encoders(encoders)


def planned_tokenizer(file: Path) -> tuple[Tokenizer | None, str]:
    """The tokenizer of the text tower of a training, None where it has none, and what says so.

    `file` is the configuration of any stage, of a recipe or of a run. Where it names no tower, another stage of the
    recipe does, or the newest tower beside the run is meant; ValueError: there is none.
    """
    others = (file.with_name(f"{stage}.yaml") for stage in ("clip", "ldm"))
    for path in (file, *filter(Path.is_file, others)):
        values = read_yaml(path)
        if "clip" in values:
            clip = CLIPConfig.from_dict(values["clip"], source=f"{path}: clip")
            return Tokenizer(clip.context_length), f"clip.context_length of {relative(path)}"
        text = TextConfig.from_dict(values.get("text", {}), source=f"{path}: text")
        if text.model != "latest":
            return _tokenizer(text), f"text.model {text.model} of {relative(path)}"
    runs_dir = Path(read_yaml(file).get("run", "runs/any")).parent
    model_id = latest_tower(runs_dir, script="accelerate launch scripts/train_clip.py")
    return _tokenizer(TextConfig(model=model_id)), model_id


def _tokenizer(config: TextConfig) -> Tokenizer | None:
    """That of a tower; the weights of a published one are not read."""
    if config.model == "none":
        return None
    if config.model.startswith((LOCAL, HUB)):
        return TextEncoder.load(config).tokenizer
    with torch.device("meta"):
        return TextEncoder.random(config).tokenizer
