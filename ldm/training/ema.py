"""Exponential moving average of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.training.fsdp import full_tensor


class EMA:
    """Averages the trained parameters of a module in float32, with the warm-up min(decay, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.shadow = {name: p.detach().float().clone() for name, p in trained_parameters(module).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [p.detach().float() for p in trained_parameters(self.module).values()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The module holds the averages inside the `with`, and the shadow its own weights, without a copy of either."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.module.named_parameters():
            if name in self.shadow:
                parameter.data, self.shadow[name] = self.shadow[name], parameter.data


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def copy_params(weights: dict[str, Tensor], module: nn.Module) -> None:
    """Copy tensors into the parameters of their names; sharded ones are gathered, so all ranks must call this."""
    for name, parameter in module.named_parameters():
        if name in weights:
            parameter.copy_(full_tensor(weights[name]))
