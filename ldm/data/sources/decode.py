"""PNG, JPEG and WEBP files: decoded to 8 bits, upright, on white; and the source that holds such images."""

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ldm.data.sources.base import Decoded, ImageTextSource, one_line
from ldm.data.transforms import Sides, View, crop_resize_to_tensor

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_MEGAPIXELS = 64
Encoded = bytes | Path  # a file's content, or where it is


@dataclass(frozen=True, kw_only=True)
class EncodedSource(ImageTextSource):
    """A source of images of 8 bits, which are resized in 8 bits."""

    images: Sequence[Encoded | Image.Image]

    def read(self, index: int, view: View, *, channels: int, side: int) -> Decoded:
        """What a view shows of an image."""
        image, original_size = decode_reduced(self.images[index], channels=channels, side=side)
        pixels, corner = crop_resize_to_tensor(image, view, channels=channels)
        return Decoded(pixels, corner, original_size)

    def size(self, index: int) -> Sides:
        """Height and width, from the header of a file."""
        try:
            return image_size(self.images[index])
        except ValueError:
            return 1, 1


def decode_image(data: Encoded, *, channels: int = 3) -> Image.Image:
    """The first frame of a PNG, JPEG or WEBP file, upright, on white, in 8 bits: mode RGB, or L for one channel.

    ValueError: not such an image, damaged, or above 64 megapixels, which is known before any pixel is decoded.
    """
    return decode_reduced(data, channels=channels)[0]


def decode_reduced(data: Encoded | Image.Image, *, channels: int, side: int | None = None) -> tuple[Image.Image, Sides]:
    """As `decode_image`, but a large JPEG at a lower resolution, not below twice `side`; and its full upright size."""
    if isinstance(data, Image.Image):
        return data, (data.height, data.width)
    try:
        with Image.open(_regular_file(data), formats=FORMATS) as image:
            size = (image.height, image.width)
            if size[0] * size[1] > MAX_MEGAPIXELS * 1e6:
                raise Image.DecompressionBombError
            if side is not None:
                image.draft(None, (2 * side, 2 * side))
            image.load()
            if image.info:  # else there is no orientation to look for
                size = size[::-1] if _is_turned(image) else size
                ImageOps.exif_transpose(image, in_place=True)
            upright = _flatten_alpha(image)
    except Image.DecompressionBombError:
        raise ValueError(f"larger than the limit of {MAX_MEGAPIXELS} megapixels; shrink it") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a PNG, JPEG or WEBP image") from None
    except Exception as error:  # damaged files raise errors of many types in Pillow's decoders
        raise ValueError(one_line(error) or type(error).__name__) from None
    mode = "RGB" if channels == 3 else "L"
    return (upright if upright.mode == mode else upright.convert(mode)), size


def image_size(data: Encoded | Image.Image) -> Sides:
    """Height and width of an upright image, from the header of its file; (1, 1) for a file that cannot be read."""
    if isinstance(data, Image.Image):
        return data.height, data.width
    try:
        with Image.open(_regular_file(data), formats=FORMATS) as image:
            turned = "exif" in image.info and _is_turned(image)  # else a PNG would be decoded to look for it
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # damaged files raise errors of many types in Pillow's decoders; `decode_image` gives the reason
        return 1, 1


def _regular_file(data: Encoded) -> io.BytesIO | Path:
    """What Pillow reads; OSError for a path to no regular file, such as a pipe, which would never end."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if not stat.S_ISREG(os.stat(data).st_mode):
        raise OSError("not a regular file")
    return data


def _is_turned(image: Image.Image) -> bool:
    """Whether it is shown with height and width exchanged."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)


def _flatten_alpha(image: Image.Image) -> Image.Image:
    """On white, and 16-bit grey scaled to 8 bits (Pillow's own conversion would clip it)."""
    if image.mode.startswith("I"):
        grey = np.asarray(image, np.float32)
        clear = image.info.get("transparency")  # a value that is transparent everywhere
        grey = np.where(grey == clear, 65535, grey) if isinstance(clear, int) else grey
        return Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image
