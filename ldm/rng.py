"""Keyed randomness: every draw is a pure function of (seed, stream, step or epoch, position)."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.io.tensors import to_device


def fold_seed(*parts: int | str) -> int:
    """A 63-bit seed from a tuple such as (seed, "noise", step, position)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `fold_seed(*parts)`: the same numbers on every machine and for every device."""
    return torch.Generator("cpu").manual_seed(fold_seed(*parts))


class StepRNG:
    """The random numbers of some samples of one training step, each keyed by its position in the global batch.

    So the draws do not depend on how a batch is divided among ranks and micro-batches, nor on where a run was resumed.
    """

    def __init__(self, seed: int, step: int, positions: Sequence[int], batch_size: int, device: torch.device) -> None:
        self.seed, self.step, self.positions, self.device = seed, step, list(positions), device
        self.batch_size = batch_size  # global: over all ranks and micro-batches of the step

    def randn(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers (len(positions), *shape), float32."""
        return self._draw(Tensor.normal_, stream, shape, self.device)

    def rand(self, stream: str, device: torch.device | None = None) -> Tensor:
        """One number in [0, 1) for each sample, (len(positions),), float32; on the RNG's device unless one is given."""
        return self._draw(Tensor.uniform_, stream, (), device or self.device)

    def _draw(self, fill: Callable[..., Any], stream: str, shape: Sequence[int], device: torch.device) -> Tensor:
        numbers = torch.empty(len(self.positions), *shape, pin_memory=device.type == "cuda")
        stream_generator = torch.Generator("cpu")  # reseeded for each sample, which is cheaper than a new one
        for row, position in zip(numbers, self.positions, strict=True):
            fill(row, generator=stream_generator.manual_seed(fold_seed(self.seed, stream, self.step, position)))
        return to_device(numbers, device)
