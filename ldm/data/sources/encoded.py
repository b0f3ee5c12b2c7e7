"""Sources of 8-bit image files: PNG, JPEG and WEBP, decoded and resized in 8 bits."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.data.sources.base import Decoded, ImageTextSource
from ldm.data.transforms import Sides, View, crop_resize_to_tensor
from ldm.imaging import Encoded, decode_reduced, image_size

if TYPE_CHECKING:  # it takes long to load
    from datasets import Dataset

SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".webp")
HASHED_IMAGES, HASHED_BYTES = 64, 2**16  # of a set, and of each, for `content`
DECODED_CACHE_BYTES = 2**28  # of all decoded images of a set that is drawn here


@dataclass(frozen=True, kw_only=True)
class EncodedSource(ImageTextSource):
    """A source of images of 8 bits, which are resized in 8 bits."""

    images: Sequence[Encoded | Image.Image]

    def read(self, index: int, view: View, *, channels: int, side: int) -> Decoded:
        image, original_size = decode_reduced(self.images[index], channels=channels, side=side)
        pixels, corner = crop_resize_to_tensor(image, view, channels=channels)
        return Decoded(pixels, corner, original_size)

    def size(self, index: int) -> Sides:
        try:
            return image_size(self.images[index])
        except ValueError:  # a row without an image
            return 1, 1

    def content(self) -> str:
        digest = hashlib.sha256()
        for index in self.evenly_spaced(HASHED_IMAGES):
            with contextlib.suppress(ValueError, OSError):  # no image, which training replaces
                digest.update(_first_bytes(self.images[index]))
        return digest.hexdigest()[:16]


def join_sources(sources: Sequence[EncodedSource]) -> EncodedSource:
    """The items of several sources, one after the other."""
    return EncodedSource(
        names=[name for source in sources for name in source.names],
        images=[image for source in sources for image in source.images],
        captions=[captions for source in sources for captions in source.captions],
        description="; ".join(source.description for source in sources),
        notes=[note for source in sources for note in source.notes],
    )


def _first_bytes(image: Encoded | Image.Image) -> bytes:
    """The size of an image file and its first bytes; all pixels of an image that is decoded."""
    if isinstance(image, Image.Image):
        return image.tobytes()
    if isinstance(image, bytes):
        return b"%d " % len(image) + image[:HASHED_BYTES]
    if not image.is_file():  # such as a pipe, which would never end
        return b""
    with image.open("rb") as file:
        return b"%d " % image.stat().st_size + file.read(HASHED_BYTES)


def encode_png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def png_cell(image: Image.Image) -> dict[str, bytes | None]:
    """An image as a cell of a `datasets.Image` column."""
    return {"bytes": encode_png(image), "path": None}


def image_rows(rows: list[dict[str, Any]]) -> "Dataset":
    """A `datasets.Dataset` of rows whose `image` is such a cell."""
    import datasets

    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def image_storage(count: int, *, size: int, channels: int) -> Callable[[Image.Image], Encoded | Image.Image]:
    """How an image of a set that is drawn here is stored: decoded where `count` of them fit in memory, else as PNG."""
    if count * channels * size**2 > DECODED_CACHE_BYTES:
        return encode_png
    return lambda image: image.convert("RGB" if channels == 3 else "L")
