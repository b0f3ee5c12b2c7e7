"""What every source of images and captions offers: `ImageTextSource`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ldm.data.batch_sampler import SampleKey, evenly_spaced
from ldm.data.sources.captions import Captions
from ldm.data.transforms import Sides, View


class Decoded(NamedTuple):
    """An image as a sample takes it."""

    pixels: Tensor  # (c, height, width) float32 in [-1, 1], with the sides of the view
    corner: tuple[int, int]  # top and left of the crop, at the scale of `pixels`
    original_size: Sides  # of the whole image, upright, before any decoding at a lower resolution


@dataclass(frozen=True, kw_only=True)
class ImageTextSource(ABC):
    """The items of one split: an image and its captions each. A source decodes its images itself."""

    names: Sequence[str]
    captions: Captions
    description: str

    @abstractmethod
    def read(self, index: int, view: View, *, channels: int, side: int) -> Decoded:
        """What a view shows of an image, as floats, in 1 (grey) or 3 channels. ValueError: it cannot be read.

        Cropping and resizing are the source's, as it knows its values: 8 bits, or more. A large image may be decoded at
        a lower resolution, but not below twice `side`.
        """

    @abstractmethod
    def size(self, index: int) -> Sides:
        """Height and width of an upright image, found without decoding it; (1, 1) for one that cannot be read."""

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

    def prefetch(self, keys: Sequence[SampleKey], seed: int) -> None:  # noqa: B027  (most need nothing)
        """Prepare for these samples, which are read next."""


def short_hash(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
