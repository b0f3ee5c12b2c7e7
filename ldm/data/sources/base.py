"""What a source of images and captions offers, and how splits are made and captions read.

A new kind of source is a file here with a subclass of `ImageTextSource`, and a line in `open_source` (data/dataset.py).
"""

import hashlib
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from ldm import rng
from ldm.data.batch_sampler import SampleKey, evenly_spaced
from ldm.data.transforms import Sides, View

Split = Literal["train", "test"]
HELD_OUT_FRACTION = 0.05  # of the items of a set without a test split
HELD_OUT_SPLITS = ("test", "validation")  # of those that a set brings, the first is held out
SPLIT_NAME = re.compile(
    r"(?<![a-z])(?:(?P<train>train|training)|(?P<test>test|testing|eval|evaluation)"
    r"|(?P<validation>validation|valid|val|dev))(?![a-z])"
)
CAPTION_COLUMNS = ("caption", "text", "prompt")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, from a JSON escape


class Decoded(NamedTuple):
    """An image as a sample takes it."""

    pixels: Tensor  # (c, height, width) float32 in [-1, 1], with the sides of the view
    corner: tuple[int, int]  # top and left of the crop, at the scale of `pixels`
    original_size: Sides  # of the whole image, upright, before any decoding at a lower resolution


class ShardReadError(ValueError):
    """A whole shard that cannot be read or cached, which no other image replaces."""


@dataclass(frozen=True, kw_only=True)
class ImageTextSource(ABC):
    """The items of one split: an image and its captions each. A source decodes its images itself."""

    names: Sequence[str]
    captions: Sequence[Sequence[str]]  # of each item: none, one or several
    description: str
    notes: Sequence[str] = ()  # a line for each thing that was left out, or not as it should be
    refused: Sequence[str] = ()  # files of a medical set that are not read, with reasons
    patients: Sequence[str] = ()  # of each item of a medical set, which no message and no file may contain

    @abstractmethod
    def read(self, index: int, view: View, *, channels: int, side: int) -> Decoded:
        """What a view shows of an image, as floats, in 1 (grey) or 3 channels. ValueError: it cannot be read.

        A large image may be decoded at a lower resolution, but not below twice `side`.
        """

    @abstractmethod
    def size(self, index: int) -> Sides:
        """Height and width of an upright image, found without decoding it; (1, 1) for one that cannot be read."""

    @property
    def shard_rows(self) -> Sequence[int]:
        """How many items each shard has; none where they are in no shards."""
        return ()

    def fallback_candidates(self, index: int) -> range:
        """The items one of which replaces an unreadable item, before any other does."""
        return range(len(self.names))

    def is_local(self, index: int) -> bool:
        """Whether an item can be read again without downloading anything."""
        return True

    def evenly_spaced(self, count: int) -> list[int]:
        """`count` items, evenly spaced."""
        return evenly_spaced(count, len(self.names))

    def fingerprint(self) -> str:
        """A hash of which items there are."""
        return short_hash("\n".join(self.names))

    def content(self) -> str:
        """A hash of the content of some items, in which sets with the same names differ; "" tells none apart."""
        return ""

    def details(self) -> Iterable[str]:
        """A line on each series of a medical set, which may name files: for check_data."""
        return ()

    def prefetch(self, keys: Sequence[SampleKey], seed: int) -> None:  # noqa: B027  (most need nothing)
        """Prepare for these samples, which are read next."""


def short_hash(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256; it may hold file names that are not UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def check_split(split: str) -> None:
    """ValueError unless `split` is train or test."""
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown: choose train or test")


def named_split(name: str) -> str | None:
    """Which split the name of a folder, a file or a split says: train, test or validation, or none, as `datasets`."""
    found = SPLIT_NAME.search(name.lower())
    return found and found.lastgroup


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


def caption_column(names: Iterable[str]) -> str | None:
    """The column of a table that holds captions, whatever its case; None when none does."""
    lower = {name.lower(): name for name in sorted(names, key=lambda name: name in CAPTION_COLUMNS)}
    return next((lower[name] for name in CAPTION_COLUMNS if name in lower), None)


def parse_captions(cell: Any, where: str) -> list[str]:
    """The captions in a cell, one or a list, each on one line, without empty ones. ValueError: not text or a number."""
    captions = []
    for value in cell if isinstance(cell, list) else [cell]:
        if value is None or value != value:  # a missing one, which pandas writes as NaN
            continue
        if not isinstance(value, str | int | float) or LONE_SURROGATE.search(text := one_line(value)):
            raise ValueError(f"{where}: the caption {reprlib.repr(value)} is not text; write text, or a list of texts")
        captions.append(text)
    return list(filter(None, captions))


def one_line(value: Any) -> str:
    """A value as text on one line."""
    return " ".join(str(value).split())


def a_or_an(words: str) -> str:
    """`a red star`, `an orange star`: by the first letter."""
    return f"an {words}" if words[0] in "aeio" else f"a {words}"


def first_names(names: Sequence[str], count: int = 5) -> str:
    """The first of some names, for a message."""
    return ", ".join(map(one_line, names[:count])) + (", ..." if len(names) > count else "")
