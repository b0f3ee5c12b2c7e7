"""Training and test split of a set that has none: a hash of each item's name decides."""

from collections.abc import Sequence
from typing import Literal, get_args

from ldm import rng

Split = Literal["train", "test"]
HELD_OUT_FRACTION = 0.05  # of the items


def check_split(split: str) -> None:
    """ValueError unless `split` is train or test."""
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown: choose train or test")


def hash_split(names: Sequence[str], split: Split) -> list[int]:
    """Indices of a split's items: 5 % are held out, by a hash of the name alone, so a new item moves no other.

    Few items are the exception: of two or more at least one is held out, and at least one is not.
    """
    check_split(split)
    hashes = [rng.fold_seed("held out", name) for name in names]
    held_out = {i for i, value in enumerate(hashes) if value < HELD_OUT_FRACTION * 2**63}
    if len(names) > 1:
        held_out = held_out or {hashes.index(min(hashes))}
        held_out -= {hashes.index(max(hashes))} if len(held_out) == len(names) else set()
    return [i for i in range(len(names)) if (i in held_out) == (split == "test")]
