"""Exponential moving average of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.training.fsdp import full_tensor


class EMA:
    """Averages a module's parameters in float32, with a decay that warms up: min(decay, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.shadow = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [p.detach().float() for p in self.module.parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The module holds the averaged weights inside the `with`, and its own again afterwards."""
        own = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        _copy_params(self.shadow, self.module)
        try:
            yield
        finally:
            _copy_params(own, self.module)

    def copy_to(self, module: nn.Module) -> None:
        """Fill the whole twin of a module that is split with the averages; all processes must call this."""
        _copy_params(self.shadow, module)


@torch.no_grad()
def _copy_params(weights: dict[str, Tensor], module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(full_tensor(weights[name]))
