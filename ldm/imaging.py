"""PIL images: decoded safely, to and from tensors, saved whole, in grids, with captions."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.io.atomic import atomic_write, check_folder
from ldm.io.image_file import open_image, turn_upright
from ldm.labels import LabelFont

MAX_MEGAPIXELS = 64
Encoded = bytes | Path  # the content of an image file, or where it is


# Files.


def decode_image(data: Encoded, *, channels: int = 3, background: str = "white") -> Image.Image:
    """The first frame of a PNG, JPEG or WEBP file, upright, opaque, in 8 bits: mode RGB, or L for one channel.

    ValueError: not such an image, damaged, or above 64 megapixels, which is known before any pixel is decoded.
    """
    return decode_reduced(data, channels=channels, background=background)[0]


def decode_reduced(
    data: Encoded | Image.Image, *, channels: int, side: int | None = None, background: str = "white"
) -> tuple[Image.Image, tuple[int, int]]:
    """`decode_image`, but a large JPEG at a lower resolution, not below twice `side`; and its full height and width."""
    if isinstance(data, Image.Image):  # decoded already
        return data, (data.height, data.width)
    try:
        with _open_file(data) as file:
            image, orientation = open_image(io.BytesIO(file.read()))
        size = (image.height, image.width)
        if size[0] * size[1] > MAX_MEGAPIXELS * 1e6:
            raise Image.DecompressionBombError
        if side is not None:
            image.draft(None, (2 * side, 2 * side))
        image.load()
        upright = flatten_alpha(turn_upright(image, orientation), background)
    except Image.DecompressionBombError:
        raise ValueError(f"larger than the limit of {MAX_MEGAPIXELS} megapixels; shrink it") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a PNG, JPEG or WEBP image") from None
    except Exception as error:  # damaged files raise errors of many types in Pillow's decoders
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    mode = "RGB" if channels == 3 else "L"
    return (upright if upright.mode == mode else upright.convert(mode)), _upright(size, orientation)


def image_size(data: Encoded | Image.Image) -> tuple[int, int]:
    """Height and width of an upright image, from the header of its file; (1, 1) for a file that cannot be read."""
    if isinstance(data, Image.Image):
        return data.height, data.width
    try:
        with _open_file(data) as file:
            image, orientation = open_image(file, header=True)
            return _upright((image.height, image.width), orientation)
    except Exception:  # damaged files raise errors of many types in Pillow's decoders; `decode_image` gives the reason
        return 1, 1


def check_image_file(path: Path, flag: str) -> None:
    """ValueError unless an image can be saved there; see `check_folder`."""
    if path.is_dir() or path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{flag} {path} names no image file: pass one such as sheet.png")
    check_folder(path.parent, flag)


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Write an image whole; `options` are Pillow's."""
    with atomic_write(path) as partial:
        image.save(partial, **options)


def _open_file(data: Encoded) -> BinaryIO:
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if not data.is_file() and data.exists():  # such as a pipe, which would never end
        raise OSError("not a regular file")
    return data.open("rb")


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Height and width once an image is turned."""
    return size[::-1] if orientation > 4 else size


def flatten_alpha(image: Image.Image, background: str = "white") -> Image.Image:
    """On white or black, and 16-bit grey scaled to 8 bits (Pillow's own conversion would clip it)."""
    if image.mode.startswith("I"):
        grey = np.asarray(image, np.float32)
        clear = image.info.get("transparency")  # a value that is transparent everywhere
        grey = np.where(grey == clear, 65535 * (background == "white"), grey) if isinstance(clear, int) else grey
        return Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image


# Tensors.


def pil_to_tensor(image: Image.Image, channels: int) -> Tensor:
    """An 8-bit image -> (channels, h, w) float32 in [-1, 1]; 1 channel is grey, 3 are red, green and blue."""
    mode = "L" if channels == 1 else "RGB"
    array = np.array(image if image.mode == mode else image.convert(mode)).reshape(image.height, image.width, -1)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)


def tensor_to_pil(pixels: Tensor) -> list[Image.Image]:
    """(b, 1 or 3, h, w) in [-1, 1] -> 8-bit images."""
    array = _levels(pixels).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item) for item in array]


def to_8_bits(pixels: Tensor) -> Tensor:
    """Images in [-1, 1] in the steps of 8 bits, as a PNG would hold them, on the CPU."""
    return _levels(pixels).cpu() / 127.5 - 1


def _levels(pixels: Tensor) -> Tensor:
    """Values in [-1, 1] as whole numbers from 0 to 255, in float32."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255)


# Layout.


def image_grid(
    images: Sequence[Image.Image], *, columns: int | None = None, scale: int = 1, gap: int = 2
) -> Image.Image:
    """Images in rows, those of other shapes letterboxed; `scale` enlarges with hard pixel edges, `gap` is in pixels."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    side = max(image.width for image in images) * scale, max(image.height for image in images) * scale
    width, height = side[0] + gap, side[1] + gap
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, image in enumerate(images):
        grid.paste(letterbox(image, side), (i % columns * width, i // columns * height))
    return grid


def letterbox(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole image, as large as it fits into a width and height, on grey; enlarged with hard pixel edges."""
    larger = image.width > size[0] or image.height > size[1]
    filter = Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST
    return ImageOps.pad(image.convert("RGB"), size, filter, color="grey")


def captioned_grid(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int, side: int = 128
) -> Image.Image:
    """A grid of images in squares of `side` pixels, each with its caption, wrapped, below it."""
    font = LabelFont(captions)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        cell = Image.new("RGB", (side, side + 58), "white")
        cell.paste(letterbox(image, (side, side)))
        cell.paste(font.label(caption, side - 2), (1, side + 2))
        cells.append(cell)
    return image_grid(cells, columns=columns, gap=8)


def pad_for_outpainting(
    image: Image.Image, mask: Image.Image | None, edges: tuple[int, int, int, int]
) -> tuple[Image.Image, Image.Image]:
    """Repeat the outermost pixels of an RGB image beyond its left, top, right and bottom edge, and mask them."""
    left, top, right, bottom = edges
    padded = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    inner = Image.new("L", image.size) if mask is None else mask
    outer = Image.new("L", (image.width + left + right, image.height + top + bottom), 255)
    outer.paste(inner, (left, top))
    return Image.fromarray(padded), outer
