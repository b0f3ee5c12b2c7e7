"""Image files: their pixels, and how these are turned, whatever is damaged in the metadata around them."""

import contextlib
import io
import math
import re
import warnings
from typing import Any, BinaryIO

from PIL import ExifTags, Image

FORMATS = ("PNG", "JPEG", "WEBP")
TRANSPOSES = {  # by orientation, as EXIF numbers it: from what is stored to what is upright
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of damaged metadata, which do no harm

XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PNG_NOTES = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # may hold EXIF or XMP
MAX_NOTE_BYTES = 2**20
EMPTY_IDAT = bytes(4) + b"IDAT"  # where Pillow ends to read a header
# The segments of a JPEG that matter, and how many bytes each has at least: JFIF, EXIF or XMP, Adobe's colour transform.
JPEG_NOTES = {b"\xe0": 18, b"\xe1": 4, b"\xee": 16}
WEBP_CHUNKS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"XMP ")


def open_image(file: BinaryIO, *, header: bool = False) -> tuple[Image.Image, int]:
    """A PNG, JPEG or WEBP file whose pixels are not decoded yet, and its orientation: 1 (upright) to 8, as in EXIF.

    With `header` no pixel is read, and none can be decoded. Any error of Pillow's: not such a file, or damaged.
    """
    signature = file.read(len(PNG_SIGNATURE))
    file.seek(0)
    if signature == PNG_SIGNATURE:
        image, info = _open_png(file, header=header)
        return image, orientation_of(info)
    try:
        image = Image.open(file, formats=FORMATS)
    except Exception:  # damaged metadata raise errors of many types in Pillow's decoders
        file.seek(0)
        data = file.read()
        stripped = _strip_webp(data) if data.startswith(b"RIFF") else _strip_jpeg(data)
        image = Image.open(io.BytesIO(stripped), formats=FORMATS)
    return image, orientation_of(image.info)


def _open_png(file: BinaryIO, *, header: bool) -> tuple[Image.Image, dict[Any, Any]]:
    """An image of the chunks that make its pixels, and what those of the others say that can be read, wherever."""
    pixels, notes = [file.read(len(PNG_SIGNATURE))], []
    while len(head := file.read(8)) == 8:
        kind, length = head[4:], int.from_bytes(head[:4]) + 4  # with its checksum
        if header and kind == b"IDAT":
            pixels.append(head)
            file.seek(length, io.SEEK_CUR)
        elif kind in PNG_PIXELS:
            pixels.append(head + file.read(length))
        elif kind in PNG_NOTES and length < MAX_NOTE_BYTES:
            notes.append(head + file.read(length))
        else:
            file.seek(length, io.SEEK_CUR)
    info: dict[Any, Any] = {}
    for note in notes:
        with contextlib.suppress(Exception):
            info |= Image.open(io.BytesIO(b"".join([*pixels[:2], note, EMPTY_IDAT])), formats=FORMATS).info
    return Image.open(io.BytesIO(b"".join(pixels)), formats=FORMATS), info


def _strip_jpeg(data: bytes) -> bytes:
    """A JPEG file without the segments before its pixels that say nothing of colours or orientation."""
    kept, start = [data[:2]], 2
    while data[start : start + 1] == b"\xff" and (marker := data[start + 1 : start + 2]) != b"\xda":  # start of scan
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        if end - start >= JPEG_NOTES.get(marker, 4 if marker < b"\xe0" else math.inf):
            kept.append(data[start:end])
        start = end
    return b"".join([*kept, data[start:]])


def _strip_webp(data: bytes) -> bytes:
    """A WEBP file of the whole chunks that make its pixels, or may say how these are turned."""
    kept, start = [b"WEBP"], 12
    while start < len(data):
        length = int.from_bytes(data[start + 4 : start + 8], "little")
        end = start + 8 + length + length % 2
        if data[start : start + 4] in WEBP_CHUNKS and end <= len(data):
            kept.append(data[start:end])
        start = end
    body = b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """An image as it is shown: turned and flipped as its orientation says, from 1 to 8."""
    method = TRANSPOSES[orientation]
    return image if method is None else image.transpose(method)


def orientation_of(info: dict[Any, Any]) -> int:
    """What the EXIF in an image's `info` says, or else its XMP, from 1 to 8; 1 where neither can be read."""
    for name in ("exif", "Raw profile type exif", "Raw profile type APP1"):  # the last two by ImageMagick, in PNGs
        with contextlib.suppress(Exception):
            data, exif = info[name], Image.Exif()
            exif.load(data if isinstance(data, bytes) else bytes.fromhex("".join(data.split("\n")[3:])))
            if (orientation := exif.get(ExifTags.Base.Orientation)) in TRANSPOSES:
                return int(orientation)
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp", "")
    found = XMP_ORIENTATION.search(xmp if isinstance(xmp, bytes) else xmp.encode())
    return int(found[1]) if found else 1
