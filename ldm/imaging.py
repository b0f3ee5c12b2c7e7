"""Grids, captions and other small helpers around PIL images."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.io.atomic import atomic_write


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture whole; `options` are Pillow's."""
    with atomic_write(path) as beside:
        image.save(beside, **options)


def image_grid(
    images: Sequence[Image.Image], *, columns: int | None = None, scale: int = 1, gap: int = 2
) -> Image.Image:
    """Lay pictures of one size out in rows; `scale` enlarges them with hard pixel edges."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].width * scale + gap, images[0].height * scale + gap
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, image in enumerate(images):
        place = (i % columns * width, i // columns * height)
        sheet.paste(image.convert("RGB").resize((width - gap, height - gap), Image.Resampling.NEAREST), place)
    return sheet


def pad_for_outpainting(
    image: Image.Image, mask: Image.Image | None, edges: tuple[int, int, int, int]
) -> tuple[Image.Image, Image.Image]:
    """A picture with its outermost pixels repeated beyond the left, top, right and bottom edge, and a mask of these."""
    left, top, right, bottom = edges
    rows = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    inner = Image.new("L", image.size) if mask is None else mask
    outer = Image.new("L", (image.width + left + right, image.height + top + bottom), 255)
    outer.paste(inner, (left, top))
    return Image.fromarray(rows), outer


def captioned_grid(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int, side: int = 128
) -> Image.Image:
    """A grid with each picture's caption, wrapped, below it."""
    font = ImageFont.load_default(size=11)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        cell = Image.new("RGB", (side, side + 58), "white")
        cell.paste(image.convert("RGB").resize((side, side), Image.Resampling.NEAREST))
        ImageDraw.Draw(cell).text((1, side + 2), wrap_text(caption, font, side - 2), font=font, fill="black", spacing=1)
        cells.append(cell)
    return image_grid(cells, columns=columns, gap=8)


def wrap_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, lines: int = 4) -> str:
    """Break text into at most `lines` lines that are no wider than `width` pixels."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        rows = [*rows[:-1], longer] if font.getlength(longer) <= width else [*rows, word]
    return "\n".join(rows[:lines])
