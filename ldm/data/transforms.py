"""From an image of any size to a sample: crop, resize, flip."""

from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ldm.imaging import pil_to_tensor

Sides = tuple[int, int]  # height and width, in pixels


class View(NamedTuple):
    """What a sample shows of an image, whatever that image's size: its largest crop of some shape, resized."""

    sides: Sides  # of the sample
    offset: int | None = None  # of the crop, along the side that is too long, modulo the positions; None: the centre
    flip: bool = False  # mirrored left to right


def crop_box(size: Sides, view: View) -> tuple[int, int, float, float]:
    """Left, top, width and height, in pixels, of the crop that a view takes of an image of this size."""
    (image_height, image_width), (height, width) = size, view.sides
    wide = image_width * height > image_height * width
    crop_width = image_height * width / height if wide else image_width
    crop_height = image_height if wide else image_width * height / width
    slack = int(image_width - crop_width if wide else image_height - crop_height)
    start = slack // 2 if view.offset is None else view.offset % (slack + 1)
    return start if wide else 0, 0 if wide else start, crop_width, crop_height


def crop_resize_to_tensor(image: Image.Image, view: View, *, channels: int) -> tuple[Tensor, tuple[int, int]]:
    """Pixels (channels, height, width) in float32 in [-1, 1], and top and left of the crop at their scale.

    Resized in 8 bits, with Pillow's antialiased Lanczos filter. The corner is that of SDXL (Podell et al. 2023, 2.2).
    """
    height, width = view.sides
    left, top, crop_width, crop_height = crop_box((image.height, image.width), view)
    shown_left = float(image.width - crop_width - left if view.flip else left)
    corner = round(top * height / crop_height), round(shown_left * height / crop_height)
    if image.size != (width, height):
        edges = (left, top, left + crop_width, top + crop_height)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=edges)
    pixels = pil_to_tensor(image, channels)
    return (pixels.flip(-1) if view.flip else pixels), corner
