"""TODO."""

import io
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ldm.data.buckets import Sides

if TYPE_CHECKING:
    pass
from ldm.data.sources.base import Encoded, _text

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_MEGAPIXELS = 64
ORIGINAL_SIZE = "whole"  # in a picture's info: its size, where it was decoded to a smaller one


def decode_image(data: Encoded, *, channels: int = 3, side: int | None = None) -> Image.Image:
    """The first frame of a PNG, JPEG or WEBP file, upright, on white, in 8 bits: mode RGB, or L for one channel.

    Give the `side` that is wanted in the end to read a large JPEG at a lower resolution, never below twice `side`.
    ValueError: not such an image, damaged, or above 64 megapixels, which is known before any pixel is decoded.
    """
    try:
        with Image.open(_file(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_MEGAPIXELS * 1e6:
                raise Image.DecompressionBombError
            whole = image.size
            if side is not None:
                image.draft(None, (2 * side, 2 * side))
            image.load()
            if image.info:  # else there is no orientation to look for
                ImageOps.exif_transpose(image, in_place=True)
            plain = _flatten_alpha(image)
            if image.size != whole:
                plain.info[ORIGINAL_SIZE] = (
                    whole if (image.width > image.height) == (whole[0] > whole[1]) else whole[::-1]
                )
    except Image.DecompressionBombError:
        raise ValueError(f"larger than the limit of {MAX_MEGAPIXELS} megapixels; shrink it") from None
    except Image.UnidentifiedImageError:
        raise ValueError("no PNG, JPEG or WEBP image") from None
    except Exception as error:  # damaged files raise errors of many types in Pillow's decoders
        raise ValueError(_text(error) or type(error).__name__) from None
    mode = "RGB" if channels == 3 else "L"
    return plain if plain.mode == mode else plain.convert(mode)


def _file(data: Encoded) -> io.BytesIO | Path:
    """What Pillow reads; OSError for a path to no regular file, such as a pipe, which would never end."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if not stat.S_ISREG(os.stat(data).st_mode):
        raise OSError("no regular file")
    return data


def _flatten_alpha(image: Image.Image) -> Image.Image:
    """Without transparency, and 16-bit grey scaled (Pillow's own conversion would clip it)."""
    if image.mode.startswith("I"):
        grey = np.asarray(image, np.float32)
        clear = image.info.get("transparency")  # a value that means white
        grey = np.where(grey == clear, 65535, grey) if isinstance(clear, int) else grey
        return Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def image_size(data: Encoded | Image.Image) -> Sides:
    """Height and width of an upright image, from the head of its file; a square for a file that can not be read."""
    if isinstance(data, Image.Image):
        return data.height, data.width
    try:
        with Image.open(_file(data), formats=FORMATS) as image:
            told = image.getexif() if "exif" in image.info else {}  # else a PNG would be decoded to look for it
            turned = told.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # damaged files raise errors of many types in Pillow's decoders; `decode` tells which
        return 1, 1
