"""Metadata of image files: what is damaged hides no pixels, and header and pixels agree on what is turned."""

import random
import struct
import zlib

import numpy as np
import pytest
from helpers import encoded
from PIL import Image

from ldm.imaging import decode_image, image_size

WIDE = Image.effect_noise((20, 10), 50).convert("RGB")
PNG, JPEG, WEBP = encoded(WIDE), encoded(WIDE, "JPEG", quality=95), encoded(WIDE, "WEBP", lossless=True)
XMPS = (b'<a tiff:Orientation="6"/>', b"<a tiff:Orientation = '6'/>", b"<tiff:Orientation>6</tiff:Orientation>")


def exif(*entries: tuple[int, int, bytes], order: str = "<") -> bytes:
    """EXIF of tags, types and values of 4 bytes."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    rows = [struct.pack(order + "HHI", tag, kind, 1) + value for tag, kind, value in entries]
    return b"Exif\0\0" + b"".join([head, *rows, bytes(4)])


TURNED = (0x112, 3, struct.pack("<HH", 6, 0))  # by a quarter
EXIF = exif(TURNED)


def png(kind: bytes, data: bytes, *, after: bool = False, checksum: int = 0, whole: bytes = PNG) -> bytes:
    """A PNG with one more chunk, before or after its pixels; `checksum` is added to its checksum."""
    crc = (zlib.crc32(kind + data) + checksum) % 2**32
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)
    at = len(whole) - 12 if after else 33
    return whole[:at] + chunk + whole[at:]


def jpeg(marker: int, data: bytes, whole: bytes = JPEG) -> bytes:
    """A JPEG with one more segment, the first."""
    return whole[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + whole[2:]


def check(data: bytes, *, turned: bool) -> None:
    """The pixels are those of the file without metadata, and the header tells their size."""
    like = PNG if data.startswith(PNG[:8]) else JPEG if data.startswith(JPEG[:2]) else WEBP
    want = decode_image(like).transpose(Image.Transpose.ROTATE_270) if turned else decode_image(like)
    image = decode_image(data)
    assert np.array_equal(np.asarray(image), np.asarray(want))
    assert image_size(data) == (image.height, image.width)


def itxt(xmp: bytes, *, compressed: bool) -> bytes:
    return b"XML:com.adobe.xmp\0" + (b"\1\0\0\0" + zlib.compress(xmp) if compressed else b"\0\0\0\0" + xmp)


@pytest.mark.parametrize("after", [False, True])
def test_the_orientation_of_a_png(after: bool) -> None:
    profile = b"\nexif\n%8d\n" % len(EXIF) + EXIF.hex().encode()
    check(png(b"eXIf", EXIF[6:], after=after), turned=True)
    check(png(b"tEXt", b"Raw profile type exif\0" + profile, after=after), turned=True)
    check(png(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile), after=after), turned=True)
    check(png(b"tEXt", b"Raw profile type APP1\0" + profile, after=after, whole=png(b"eXIf", b"garbage")), turned=True)
    for xmp in XMPS:
        for compressed in (True, False):
            check(png(b"iTXt", itxt(xmp, compressed=compressed), after=after), turned=True)


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_the_orientation_of_other_formats(format: str, options: dict[str, object]) -> None:
    for xmp in XMPS:
        check(encoded(WIDE, format, xmp=xmp, **options), turned=True)
        check(encoded(WIDE, format, xmp=xmp, exif=b"Exif\0\0garbage", **options), turned=True)
    check(encoded(WIDE, format, xmp=XMPS[0], exif=exif((0x112, 3, struct.pack("<HH", 1, 0))), **options), turned=False)


def test_all_orientations() -> None:
    for orientation in range(12):
        data = encoded(WIDE, exif=exif((0x112, 3, struct.pack("<HH", orientation, 0))))
        image = decode_image(data)
        assert image.size == ((10, 20) if orientation in (5, 6, 7, 8) else (20, 10))
        assert image_size(data) == (image.height, image.width)


@pytest.mark.parametrize("odd", [(0x100, 9, struct.pack("<i", -5)), (0x101, 8, struct.pack("<hh", -3, 0))])
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_negative_values_in_unsigned_tags(odd: tuple[int, int, bytes], format: str, options: dict[str, object]) -> None:
    check(encoded(WIDE, format, exif=exif(odd, TURNED), **options), turned=True)


@pytest.mark.parametrize("after", [False, True])
def test_damaged_chunks_of_a_png(after: bool) -> None:
    draw = random.Random(0)
    for kind in b"eXIf iTXt tEXt zTXt iCCP gAMA cHRM sRGB pHYs tIME acTL fcTL fdAT".split():
        for length in (0, 1, 3, 8, 26, 300):
            for checksum in (0, 1):
                check(png(kind, draw.randbytes(length), after=after, checksum=checksum), turned=False)
    check(png(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nno hex", after=after), turned=False)
    bomb = zlib.compress(bytes(2**22))
    for kind in (b"zTXt", b"iCCP"):
        check(png(kind, b"a\0\0" + bomb, after=after), turned=False)


def test_damaged_segments_of_a_jpeg() -> None:
    multi = b"MPF\0II*\0\x08\0\0\0\2\0\1\xb0\4\0\1\0\0\0\2\0\0\0\2\xb0\7\0\4\0\0\0\0\0\0\0" + bytes(4)
    turned = jpeg(0xE1, EXIF)
    damaged = [(0xE0, b"JFIF"), (0xE1, b"Exif\0\0II*\0"), (0xE2, b"ICC_PROFILE\0"), (0xE2, multi), (0xEE, b"Adobe")]
    for marker, data in damaged:
        check(jpeg(marker, data), turned=False)
        if marker != 0xE1:
            check(jpeg(marker, data, turned), turned=True)


def test_damaged_chunks_of_a_webp() -> None:
    data = encoded(WIDE, "WEBP", lossless=True, exif=EXIF, xmp=XMPS[0])
    check(data[:-8], turned=True)  # in the XMP
    check(data[: data.index(b"EXIF") + 12], turned=False)
    check(data[:4] + struct.pack("<I", len(data) + 90) + data[8:], turned=True)
    check(data.replace(b"XMP " + struct.pack("<I", len(XMPS[0])), b"XMP \xff\xff\xff\x7f"), turned=True)
