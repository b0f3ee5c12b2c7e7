"""What conditions a network: text context, pooled vector, sizes, spatial channels. Tensors only."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KV = tuple[Tensor, Tensor]  # keys and values


class CachedContext:
    """A context (b, n, d) whose keys and values are computed once for each attention: no sampling step changes them."""

    def __init__(self, hidden_states: Tensor) -> None:
        self.hidden_states, self.shape = hidden_states, hidden_states.shape
        self._kv: dict[Callable[[Tensor], KV], KV] = {}

    def kv(self, project: Callable[[Tensor], KV]) -> KV:
        """Keys and values, (b, heads, n, d) each, by the projection of one attention."""
        if project not in self._kv:
            self._kv[project] = project(self.hidden_states)
        return self._kv[project]


@dataclass(frozen=True)
class Conditioning:
    """All conditions of a batch of b items; None where the network has no such input."""

    context: Tensor | CachedContext | None = None  # (b, n, context_dim), for cross-attention
    context_mask: Tensor | None = None  # (b, n) bool, True where the context may be attended to; None: everywhere
    pooled: Tensor | None = None  # (b, pooled_dim), added to the time embedding
    sizes: Tensor | None = None  # (b or 1, 6), pixels: original height and width, crop top and left, height and width
    spatial: Tensor | None = None  # (b or 1, cond_channels, h, w), concatenated to z_t

    def cast(self, dtype: torch.dtype) -> "Conditioning":
        """The same in another precision: what networks multiply, so neither masks nor sizes."""
        parts = {name: getattr(self, name) for name in ("context", "pooled", "spatial")}
        return replace(self, **{name: part if part is None else part.to(dtype) for name, part in parts.items()})

    def cached(self) -> "Conditioning":
        """The same with a `CachedContext`, for sampling."""
        return replace(self, context=CachedContext(self.context)) if isinstance(self.context, Tensor) else self
