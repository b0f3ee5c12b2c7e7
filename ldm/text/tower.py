"""The text half of a CLIP: token ids -> hidden states, mask and pooled embedding."""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.layers import LayerNorm


class TextEmbeddings(NamedTuple):
    """The embeddings of b prompts."""

    hidden_states: Tensor  # (b, n, width)
    mask: Tensor | None  # (b, n) bool, True up to and with the end token; None where all are attended to
    pooled: Tensor  # (b, embed_dim), CLIP's text feature, not normalized


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block of CLIP (Radford et al. 2021, section 2.4), with causal attention."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, quick_gelu: bool) -> None:
        super().__init__()
        self.heads, self.quick_gelu = heads, quick_gelu
        self.ln_1 = LayerNorm(width)
        self.attn = nn.ModuleDict({"out_proj": nn.Linear(width, width)})
        self.attn.register_parameter("in_proj_weight", nn.Parameter(torch.empty(3 * width, width)))
        self.attn.register_parameter("in_proj_bias", nn.Parameter(torch.empty(3 * width)))
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp_width), "c_proj": nn.Linear(mlp_width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) -> the same."""
        qkv = F.linear(self.ln_1(x), cast(Tensor, self.attn.in_proj_weight), cast(Tensor, self.attn.in_proj_bias))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["out_proj"](attended.transpose(1, 2).flatten(2))
        hidden = self.mlp["c_fc"](self.ln_2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)
        return x + self.mlp["c_proj"](hidden)


class TextTower(nn.Module):
    """CLIP's text transformer by open_clip's `model_cfg`, with its parameter names and without its slow import."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.cfg, text = cfg, cfg["text_cfg"]
        self.token_ids: Tensor | None = None  # of a pruned tower: those whose embeddings are not zero
        width, heads, self.length = text["width"], text["heads"], text.get("context_length", 77)
        block = (width, heads, int(width * text.get("mlp_ratio", 4.0)))
        quick_gelu = cfg.get("quick_gelu", False)
        self.token_embedding = nn.Embedding(text.get("vocab_size", 49408), width)
        self.positional_embedding = nn.Parameter(torch.empty(self.length, width))
        layers = [ResidualAttentionBlock(*block, quick_gelu=quick_gelu) for _ in range(text["layers"])]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(layers)})
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, cfg["embed_dim"]))

    @property
    def blocks(self) -> list[ResidualAttentionBlock]:
        """All layers, in order."""
        return list(cast(nn.ModuleList, self.transformer["resblocks"]))  # type: ignore[arg-type]

    def forward(
        self, ids: Tensor, *, end_token_id: int | None = None, layer: str = "last", final_layer_norm: bool = True
    ) -> TextEmbeddings:
        """(b, n) token ids -> the hidden states of `layer`, normalized or not, the mask and the pooled embedding.

        The end token is `end_token_id`, or the largest id, as it is in CLIP's own vocabulary.
        """
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        *earlier, final = self.blocks
        for block in earlier:
            x = block(x)
        last = final(x)
        end = (ids if end_token_id is None else (ids == end_token_id).int()).argmax(dim=1)
        mask = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
        pooled = self.ln_final(last)[torch.arange(len(ids), device=ids.device), end] @ self.text_projection
        hidden_states = last if layer == "last" else x
        return TextEmbeddings(self.ln_final(hidden_states) if final_layer_norm else hidden_states, mask, pooled)
