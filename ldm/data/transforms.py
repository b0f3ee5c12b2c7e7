"""TODO."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.buckets import Sides

if TYPE_CHECKING:
    pass


class CropBox(NamedTuple):
    """The largest rectangle of some shape in an image, in its pixels."""

    left: int
    top: int
    width: float
    height: float


def crop_box(image: Image.Image, sides: Sides, offset: int | None = None) -> CropBox:
    """Where the cut lies that has the shape of `sides` (height, width).

    It is the centre one, or begins at `offset` of the side that is too long (any number, modulo the places there are).
    """
    height, width = sides
    wide = image.width * height > image.height * width
    across = image.height * width / height if wide else image.width
    down = image.height if wide else image.width * height / width
    slack = int(image.width - across if wide else image.height - down)
    start = slack // 2 if offset is None else offset % (slack + 1)
    return CropBox(start if wide else 0, 0 if wide else start, across, down)


def crop_resize_to_tensor(image: Image.Image, sides: Sides, cut: CropBox | None = None) -> Tensor:
    """The cut (the centre one), made as large as `sides` with antialiasing: (c, height, width), float32 in [-1, 1]."""
    height, width = sides
    if image.size != (width, height):
        left, top, across, down = cut or crop_box(image, sides)
        box = (left, top, left + across, top + down)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(image).reshape(height, width, -1)).permute(2, 0, 1)
    return pixels.contiguous().float().div_(127.5).sub_(1)
