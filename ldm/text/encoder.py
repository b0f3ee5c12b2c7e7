"""A frozen OpenCLIP text tower: prompts -> token states, mask and pooled vector."""

import hashlib
import importlib.util
import json
import logging
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.config import Config
from ldm.files import in_place_of, write_tensors, write_text
from ldm.text.prompts import parse

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
LOCAL, HUB, CONVERTED = "local-dir:", "hf-hub:", "converted"
PIECES = 20  # of a long prompt, at most
# Settings of open_clip's text towers that this one does not have; any other value than these is refused.
PLAIN = {"embed_cls": False, "no_causal_mask": False, "pool_type": "argmax", "proj_type": "linear", "proj_bias": False}

log = logging.getLogger(__name__)


class TextConfig(Config):
    """Which tower, and what to take from it."""

    model: str = "latest"
    """`local-dir:FOLDER`, an open_clip name such as ViT-H-14, `hf-hub:ORG/NAME`; `latest`: the newest finished
    train_clip run beside this one; `none`: no text"""
    pretrained: str | None = None
    """open_clip's tag of the weights, such as laion2b_s32b_b79k, when `model` is an open_clip name"""
    layer: Literal["last", "penultimate"] = "last"
    """whose token states condition the U-Net; Stable Diffusion 2 takes the penultimate"""
    normalize: bool = True
    """put the states through the tower's final layer norm; Stable Diffusion XL does not"""
    padding: int | None = Field(None, ge=0)
    """token that fills prompts up to the limit and is seen by the U-Net, as in Stable Diffusion: 49407 in 1, 0 in 2;
    left out, prompts end where they end"""
    pooled: bool = False
    """also condition on the pooled vector, added to the time embedding"""
    zero_empty: bool = False
    """zeros are the states of an empty prompt, as in Stable Diffusion XL, instead of what the tower says of it"""

    def identity(self) -> dict[str, Any]:
        """What decides the states beside the weights."""
        return self.model_dump(exclude={"model", "pretrained"})


class TextStates(NamedTuple):
    """What a tower says of a batch of prompts."""

    tokens: Tensor  # (b, length, width)
    mask: Tensor | None  # (b, length) bool, True up to and with the end token; None where all are seen
    pooled: Tensor  # (b, embed_dim), CLIP's text feature, not normalized


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block of CLIP (Radford et al. 2021, section 2.4), with causal attention."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, quick_gelu: bool) -> None:
        super().__init__()
        self.heads, self.quick_gelu = heads, quick_gelu
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"out_proj": nn.Linear(width, width)})
        self.attn.register_parameter("in_proj_weight", nn.Parameter(torch.empty(3 * width, width)))
        self.attn.register_parameter("in_proj_bias", nn.Parameter(torch.empty(3 * width)))
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp_width), "c_proj": nn.Linear(mlp_width, width)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(self.ln_1(x), cast(Tensor, self.attn.in_proj_weight), cast(Tensor, self.attn.in_proj_bias))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["out_proj"](attended.transpose(1, 2).flatten(2))
        hidden = self.mlp["c_fc"](self.ln_2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)
        return x + self.mlp["c_proj"](hidden)


class TextTower(nn.Module):
    """The text half of a CLIP; parameter names are open_clip's, so its weights load as they are.

    It is written here so that a prompt needs neither the image half nor the seconds that importing open_clip takes.
    """

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.cfg, text = cfg, cfg["text_cfg"]
        width, heads, self.length = text["width"], text["heads"], text.get("context_length", 77)
        block = (width, heads, int(width * text.get("mlp_ratio", 4.0)))
        quick_gelu = cfg.get("quick_gelu", False)
        self.token_embedding = nn.Embedding(text.get("vocab_size", 49408), width)
        self.positional_embedding = nn.Parameter(torch.empty(self.length, width))
        layers = [ResidualAttentionBlock(*block, quick_gelu=quick_gelu) for _ in range(text["layers"])]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(layers)})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, cfg["embed_dim"]))

    @property
    def blocks(self) -> list[ResidualAttentionBlock]:
        """All layers."""
        return list(cast(nn.ModuleList, self.transformer["resblocks"]))  # type: ignore[arg-type]

    def forward(self, ids: Tensor, *, layer: str = "last", normalize: bool = True) -> TextStates:
        """(b, length) token ids -> states of `layer`, after the final layer norm or before, mask and pooled vector."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        *before, final = self.blocks
        for block in before:
            x = block(x)
        last = final(x)
        end = ids.argmax(dim=1)  # the end token has the largest id
        mask = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
        pooled = self.ln_final(last)[torch.arange(len(ids)), end] @ self.text_projection
        states = last if layer == "last" else x
        return TextStates(self.ln_final(states) if normalize else states, mask, pooled)


class TextEncoder(nn.Module):
    """Tokenizer and frozen tower: always in eval mode, without gradients."""

    def __init__(self, tower: TextTower, tokenizer: Any, config: TextConfig, *, source: str, weights: Path) -> None:
        super().__init__()
        self.tower, self.tokenizer, self.config = tower, tokenizer, config
        self.source, self.weights = source, weights  # how it is named, and the file it was read from
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, config: TextConfig, *, source: str | None = None) -> "TextEncoder":
        """Build the tower that `config` names and load its weights; ValueError when there are none."""
        source = source or config.model
        try:
            cfg, weights = _find(source, config.pretrained)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"text tower {source} can not be fetched ({reason}); is the hub reached, or name a `local-dir:FOLDER`"
            ) from None
        _check_supported(cfg, source)
        with torch.device("meta"):
            tower = TextTower(cfg)
        _load_weights(tower, weights, source)
        text = cfg["text_cfg"]
        tokenizer = make_tokenizer(tower.length, **(text.get("tokenizer_kwargs") or {}))
        return cls(tower, tokenizer, config, source=source, weights=weights)

    @property
    def encoders(self) -> tuple["TextEncoder", ...]:
        """This one, as there is no other."""
        return (self,)

    @property
    def width(self) -> int:
        """Width of the token states."""
        return self.tower.positional_embedding.shape[1]

    @property
    def vector_width(self) -> int:
        """Width of the pooled vector that the U-Net gets; 0 when it gets none."""
        return self.tower.text_projection.shape[1] if self.config.pooled else 0

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in eval mode, whatever the model around does."""
        return super().train(False)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> (b, length) ids. A prompt over the limit is cut, and the log says where."""
        return self.tokenizer(prompts)

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> TextStates:
        """Encode prompts, up to the end of the longest; what follows an end token is masked and changes nothing.

        With `padding` they are filled up to the limit instead, and there is no mask.
        """
        return self.id_states(self.tokenize(prompts))

    @torch.no_grad()
    def id_states(self, ids: Tensor) -> TextStates:
        """The same for the ids (b, length) that `tokenize` gave."""
        end = ids.argmax(dim=1, keepdim=True)
        if self.config.padding is None:
            ids = ids[:, : int(end.max()) + 1]
        else:
            ids = torch.where(torch.arange(ids.shape[1], device=ids.device) > end, self.config.padding, ids)
        return self._emptied(self._states(ids.to(self._device)), end[:, 0] > 1)

    @torch.no_grad()
    def prompt_states(self, prompts: list[str]) -> TextStates:
        """Encode prompts as a person writes them: parts may be weighted, and there is no limit of tokens.

        What is over the limit is encoded by itself, and its states follow the others. A weight multiplies the states
        of its tokens; the pooled vector is that of the first piece, without weights. ValueError: see `parse`; a prompt
        of more than 20 pieces.
        """
        pieces = [self._pieces(prompt) for prompt in prompts]
        count = max(map(len, pieces))
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        filled = [own + [[]] * (count - len(own)) for own in pieces]
        rows = [[(start, 1.0), *piece, (end, 1.0)] for own in filled for piece in own]
        length = max(map(len, rows)) if self.config.padding is None else self.tower.length
        padded = [row + [(self.config.padding or 0, 1.0)] * (length - len(row)) for row in rows]
        ids, weights = torch.tensor(padded, dtype=torch.float64).to(self._device, torch.float32).unbind(-1)
        states = self._states(ids.long())
        tokens = rearrange(states.tokens * weights[..., None], "(b n) l w -> b (n l) w", n=count)
        mask = None
        if states.mask is not None:
            used = torch.tensor([i < len(own) for own in pieces for i in range(count)], device=self._device)
            mask = rearrange(states.mask & used[:, None], "(b n) l -> b (n l)", n=count)
        said = torch.tensor([bool(prompt.strip()) for prompt in prompts])
        return self._emptied(TextStates(tokens, mask, states.pooled[::count]), said)

    @property
    def _device(self) -> torch.device:
        return self.tower.positional_embedding.device

    def _states(self, ids: Tensor) -> TextStates:
        """What the tower says of ids (b, length), as this configuration wants it."""
        states = self.tower(ids, layer=self.config.layer, normalize=self.config.normalize)
        return states if self.config.padding is None else states._replace(mask=None)

    def _emptied(self, states: TextStates, said: Tensor) -> TextStates:
        """With zeros where nothing is `said` (b,), if this configuration wants it."""
        if not self.config.zero_empty:
            return states
        said = said.to(states.tokens)
        return states._replace(tokens=states.tokens * said[:, None, None], pooled=states.pooled * said[:, None])

    def _pieces(self, prompt: str) -> list[list[tuple[int, float]]]:
        """(token, weight) of a prompt, as many at a time as the tower has room for; one empty piece for no words."""
        room = self.tower.length - 2
        tokens = [(token, part.weight) for part in parse(prompt) for token in self.tokenizer.encode_all(part.text)]
        for sign in (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id):  # as it was written, or as &lt;...&gt;
            if any(token == sign for token, _ in tokens):
                name = self.tokenizer.decoder[sign]
                raise ValueError(f"prompt has {name} in it, which the text tower takes for its own sign: leave it out")
        if len(tokens) > PIECES * room:
            raise ValueError(f"prompt has {len(tokens):,} tokens, at most {PIECES * room:,} can be read: shorten it")
        return [tokens[i : i + room] for i in range(0, len(tokens), room)] or [[]]

    def save(self, folder: Path) -> str:
        """Write a local or converted tower to `folder` and return how to name it there; a public one is only named."""
        if self.source == CONVERTED:
            write_text(folder / CONFIG_NAME, json.dumps({"model_cfg": self.tower.cfg}, indent=2))
            write_tensors(folder / WEIGHTS_NAME, self.tower.state_dict())
            return LOCAL + folder.name
        if not self.source.startswith(LOCAL):
            return self.source
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            origin = Path(self.source.removeprefix(LOCAL)) / name
            if not (folder / name).exists() or not origin.samefile(folder / name):
                with in_place_of(folder / name) as beside:
                    shutil.copyfile(origin, beside)
        return LOCAL + folder.name


def _find(source: str, pretrained: str | None) -> tuple[dict[str, Any], Path]:
    """Configuration and weights file of a tower; whatever is not on the disk is fetched from the hub."""
    if source.startswith(LOCAL):
        folder = Path(source.removeprefix(LOCAL))
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise ValueError(
                    f"text tower {source} has no {name}: train one with `accelerate launch scripts/train_clip.py`, "
                    "or name a folder that open_clip saved"
                )
        return _model_cfg(folder / CONFIG_NAME), folder / WEIGHTS_NAME
    if source.startswith(HUB):
        from huggingface_hub import hf_hub_download

        config, weights = (hf_hub_download(source.removeprefix(HUB), name) for name in (CONFIG_NAME, WEIGHTS_NAME))
        return _model_cfg(Path(config)), Path(weights)
    import open_clip  # slow, and needed for its list of models only

    cfg = open_clip.get_model_config(source)
    if cfg is None:
        raise ValueError(
            f"text.model {source!r} is no open_clip model; name one, `local-dir:FOLDER` or `hf-hub:ORG/NAME`"
        )
    tags = open_clip.list_pretrained_tags_by_model(source)
    if pretrained not in tags:
        raise ValueError(
            f"text.model {source} needs weights: set text.pretrained to one of {', '.join(tags)} (got {pretrained})"
        )
    entry = open_clip.get_pretrained_cfg(source, pretrained)
    cfg = cfg | {"quick_gelu": entry.get("quick_gelu", cfg.get("quick_gelu", False))}
    return cfg, Path(open_clip.download_pretrained(entry, prefer_hf_hub=True))


def _model_cfg(path: Path) -> dict[str, Any]:
    """The architecture in open_clip's configuration file; ValueError when there is none in it."""
    try:
        cfg = dict(json.loads(path.read_text())["model_cfg"])
        return cfg | {"embed_dim": cfg["embed_dim"], "text_cfg": dict(cfg["text_cfg"])}
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} tells no text tower as open_clip's configuration does: save or fetch it again"
        ) from None


def _check_supported(cfg: dict[str, Any], source: str) -> None:
    text = cfg["text_cfg"]
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise ValueError(f"text tower {source} is a Hugging Face transformer; only CLIP's own text tower can be read")
    for name, value in PLAIN.items():
        if text.get(name, value) != value:
            raise ValueError(f"text tower {source} has {name}: {text[name]!r}; only {value!r} can be read")


def _load_weights(tower: TextTower, path: Path, source: str) -> None:
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except SafetensorError as error:
        raise ValueError(
            f"text tower {source}: {path.name} can not be read ({error}); save or fetch it again"
        ) from None
    tensors = {name.removeprefix("text."): tensor.float() for name, tensor in tensors.items()}
    missing = [name for name in tower.state_dict() if name not in tensors]
    if missing:
        raise ValueError(f"text tower {source}: {path.name} lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    tower.load_state_dict({name: tensors[name] for name in tower.state_dict()}, assign=True)


def make_tokenizer(length: int, **settings: Any) -> Any:
    """open_clip's tokenizer for `length` tokens.

    It keeps what it encoded, since training sees every caption many times, and tells once what it must cut off.
    """
    tokenizer = _tokenizer_module().SimpleTokenizer(context_length=length, **settings)
    room = length - 2  # start and end token
    tokenizer.encode_all = tokenizer.encode

    @lru_cache(2**16)
    def encode_once(prompt: str) -> list[int]:
        ids = tokenizer.encode_all(prompt)
        if len(ids) > room:
            rest = tokenizer.decode(ids[room:]).strip()
            log.warning("prompt has %d tokens, the limit is %d; ignored: %r", len(ids), room, rest)
        return ids

    tokenizer.encode = encode_once
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what decides the ids of a text: the vocabulary, in order, and the limit."""
    told = json.dumps([sorted(tokenizer.encoder.items()), tokenizer.context_length])
    return hashlib.sha256(told.encode()).hexdigest()


def _tokenizer_module() -> ModuleType:
    """open_clip's tokenizer without the rest of open_clip, whose import takes seconds that no prompt needs."""
    if "open_clip.tokenizer" in sys.modules:
        return sys.modules["open_clip.tokenizer"]
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations
    spec = importlib.util.spec_from_file_location(
        "_open_clip_tokenizer", Path(package.submodule_search_locations[0]) / "tokenizer.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
