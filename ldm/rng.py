"""Keyed randomness: every draw is a pure function of (seed, stream, step or epoch, position)."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def fold_seed(*parts: int | str) -> int:
    """A 63-bit seed from a tuple such as (seed, "noise", step, position)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that starts at `key(*parts)`; the same on every machine and for every device."""
    return torch.Generator("cpu").manual_seed(fold_seed(*parts))


class StepRNG:
    """The random numbers of some samples of one training step.

    Each sample has its own stream, keyed by its position in the global batch. So the draws do not depend on how the
    batch is cut into processes and micro-batches, nor on where the run was stopped and resumed.
    """

    def __init__(self, seed: int, step: int, positions: Sequence[int], batch_size: int, device: torch.device) -> None:
        self.seed, self.step, self.positions, self.device = seed, step, list(positions), device
        self.batch_size = batch_size  # of the whole step, over all processes and micro-batches

    def _each(self, stream: str) -> Iterable[torch.Generator]:
        return (generator(self.seed, stream, self.step, position) for position in self.positions)

    def randn(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers (len(positions), *shape), float32."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self._each(stream)]).to(self.device)

    def rand(self, stream: str) -> Tensor:
        """One number in [0, 1) for each sample: (len(positions),), float32."""
        return torch.cat([torch.rand(1, generator=g) for g in self._each(stream)]).to(self.device)
