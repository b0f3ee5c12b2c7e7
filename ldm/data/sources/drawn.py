"""What the sets that are drawn here share: PNG cells, and a source that decodes them once."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ldm.data.sources.base import Captions
from ldm.data.sources.encoded import EncodedSource
from ldm.imaging import Encoded, decode_image

if TYPE_CHECKING:
    import datasets

DECODED_CACHE_BYTES = 2**28  # of decoded images, in memory


def png_cell(image: Image.Image) -> dict[str, bytes | None]:
    """An image as a cell of a `datasets.Image` column."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def drawn_source(
    rows: "datasets.Dataset", names: Sequence[str], captions: Captions, description: str, *, size: int, channels: int
) -> EncodedSource:
    """The images of the rows, of `size` pixels, in memory; decoded once for all where there is enough of it."""
    encoded: list[Encoded] = [cell["bytes"] for cell in rows.data.column("image").to_pylist()]
    images: list[Encoded] | list[Image.Image] = encoded
    if len(encoded) * channels * size**2 <= DECODED_CACHE_BYTES:
        images = [decode_image(data, channels=channels) for data in encoded]
    return EncodedSource(names=names, images=images, captions=captions, description=description)
