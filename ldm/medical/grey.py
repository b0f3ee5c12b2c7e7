"""Grey PNG and TIFF images of 16 bits or of floats."""

from pathlib import Path

import numpy as np
from PIL import Image

from ldm.medical.formats import GREY_MODES
from ldm.medical.slices import MAX_PIXELS, Pixels, Slice, Values
from ldm.medical.windows import scale

PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # tags of TIFF
WHITE_IS_ZERO, UNSIGNED = 0, 1


def read_slices(path: Path) -> list[Slice]:
    """A slice for each page of a file. ValueError: 8 bits, colour, damaged or too large."""
    try:
        with Image.open(path, formats=["PNG", "TIFF"]) as image:
            mode, size, pages = image.mode, (image.height, image.width), getattr(image, "n_frames", 1)
    except Exception as error:  # damaged files raise errors of many types in Pillow's decoders
        raise ValueError(f"not a PNG or TIFF image, or a damaged one ({type(error).__name__})") from None
    if mode not in GREY_MODES:
        raise ValueError(f"an image of mode {mode}, only grey ones of 16 bits are read in a folder of medical files")
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[1]:,} x {size[0]:,} pixels, which is beyond the limit")
    return [Slice(path=path, index=page, size=size, bits=GREY_MODES[mode]) for page in range(pages)]


def read_pixels(item: Slice) -> Pixels:
    """The values of a page; their own window is the whole range of 16 bits."""
    try:
        with Image.open(item.path, formats=["PNG", "TIFF"]) as image:
            image.seek(item.index)
            values: Values = np.asarray(image).astype(np.float32)
            tags = getattr(image, "tag_v2", {})
    except Exception as error:
        raise ValueError(f"pixels that cannot be decoded ({type(error).__name__})") from None
    if values.shape != item.size or not np.isfinite(values).all():
        raise ValueError("pixels that are no numbers, or of another size than the first page")
    if item.bits == 32 and tags.get(SAMPLE_FORMAT, (UNSIGNED,)) == (UNSIGNED,):  # Pillow reads these as signed ones
        values = np.where(values < 0, values + np.float32(2**32), values)
    inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    return Pixels(values, inverted=inverted, own_window=(lambda: scale(values, 0, 65535)) if item.bits == 16 else None)
