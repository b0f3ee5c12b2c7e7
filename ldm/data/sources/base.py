"""TODO."""

import hashlib
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from PIL import Image

if TYPE_CHECKING:
    import datasets
from ldm import rng
from ldm.data.batch_sampler import SampleKey, evenly_spaced
from ldm.data.sources.shapes import Split

if TYPE_CHECKING:
    pass

CAPTION_COLUMNS = ("caption", "text", "prompt")
LONE_SURROGATE = re.compile(
    "[\ud800-\udfff]"
)  # of a character, as a JSON escape or a file name of another encoding has
HELD_OUT_FRACTION = 0.05  # share of the items that make the test split of a set without one
Encoded = bytes | Path
Captions = Sequence[str | list[str]]


@dataclass(frozen=True)
class ImageTextSource:
    """The items of one split; images are encoded, or pictures that were drawn. All sequences are of one length."""

    names: Sequence[str]
    images: Sequence[Encoded | Image.Image]
    captions: Captions  # one wording, or several, for each item
    description: str

    def select(self, chosen: Sequence[int]) -> "ImageTextSource":
        """The source with the items at the `chosen` positions alone."""
        names, captions = [self.names[i] for i in chosen], [self.captions[i] for i in chosen]
        images = (
            self.images.select(chosen) if isinstance(self.images, ImageColumn) else [self.images[i] for i in chosen]
        )
        return ImageTextSource(names, images, captions, self.description)

    def fallback_candidates(self, index: int) -> range:
        """The items that stand in for one that can not be read, before any other does."""
        return range(len(self.names))

    def is_local(self, index: int) -> bool:
        """Whether an item can be read again without fetching anything."""
        return True

    def evenly_spaced(self, count: int) -> list[int]:
        """`count` items, spread over all."""
        return evenly_spaced(count, len(self.names))

    def fingerprint(self) -> str:
        """A hash of which items there are."""
        return short_hash("\n".join(self.names))

    def prefetch(self, keys: Sequence[SampleKey], seed: int) -> None:
        """Make ready for these samples, which are read next."""


class ImageColumn(Sequence[Encoded]):
    """The image column of a table, read row by row; a path in it must lie in one of the `roots`."""

    def __init__(self, rows: "datasets.Dataset", name: str, roots: Sequence[Path]) -> None:
        self.rows, self.name, self.roots = rows, name, roots

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        cell = self.rows[index][self.name]
        data, path = (cell["bytes"], cell["path"]) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, bytes):
            return data
        if data is None and path and isinstance(path, str):
            return _check_within_roots(path, self.roots)
        raise ValueError("holds no image")

    def select(self, chosen: Sequence[int]) -> "ImageColumn":
        """The rows at the `chosen` positions."""
        return ImageColumn(self.rows.select(chosen), self.name, self.roots)


def _check_within_roots(path: str, roots: Sequence[Path]) -> Path:
    full = (roots[0] / path).resolve()
    if not any(full.is_relative_to(root.resolve()) for root in roots):
        raise ValueError(f"its path {path} leads out of {roots[0]}")
    return full


def as_caption_list(entry: str | list[str]) -> list[str]:
    """The captions of one item."""
    return [entry] if isinstance(entry, str) else entry


def check_utf8_names(names: Sequence[str], where: str) -> None:
    """ValueError unless all names of files are UTF-8."""
    for name in filter(LONE_SURROGATE.search, names):
        raise ValueError(f"{where}: the name {name!a} is not in UTF-8; rename that file")


def short_hash(text: str) -> str:
    """16 hexadecimal digits that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_split(split: str) -> None:
    """ValueError unless `split` is train or test."""
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown: choose train or test")


def hash_split(names: Sequence[str], split: Split) -> list[int]:
    """Positions of a split's items: 5 % are held out, by a hash of the name alone, so a new item moves no other.

    Few items are the exception: of two or more at least one is held out, and at least one is not.
    """
    check_split(split)
    keys = [rng.fold_seed("held out", name) for name in names]
    held = {i for i, value in enumerate(keys) if value < HELD_OUT_FRACTION * 2**63}
    if len(keys) > 1:
        held = (held or {keys.index(min(keys))}) - ({keys.index(max(keys))} if len(held) == len(keys) else set())
    return [i for i in range(len(keys)) if (i in held) == (split == "test")]


def parse_captions(cell: Any, where: str) -> str | list[str]:
    """The caption of a cell, or the captions of one that holds a list; ValueError for what is no text."""
    if isinstance(cell, list):
        return [text for text in (_caption(item, where) for item in cell) if text]
    return _caption(cell, where)


def _caption(value: Any, where: str) -> str:
    """A caption in one line; nothing for a missing one, which pandas writes as NaN. Numbers are text, too."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float) or LONE_SURROGATE.search(text := _text(value)):
        raise ValueError(f"{where}: the caption {reprlib.repr(value)} is no text; write text, or a list of texts")
    return text


def _text(value: Any) -> str:
    """A value in one line."""
    return " ".join(str(value).split())


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(map(_text, names[:count])) + (", ..." if len(names) > count else "")
