"""From an image of any size to a sample: crop, resize, flip."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
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
    resized, corner = _crop_resize(image, view)
    pixels = pil_to_tensor(resized, channels)
    return (pixels.flip(-1) if view.flip else pixels), corner


def crop_resize_values(values: NDArray[np.float32], view: View) -> tuple[Tensor, tuple[int, int]]:
    """The same of values (c, height, width) in [0, 1], in float32 throughout."""
    resized, corners = zip(*(_crop_resize(Image.fromarray(channel), view) for channel in values), strict=True)
    return _to_tensor(np.stack([np.asarray(channel) for channel in resized]), view), corners[0]


def crop_values(values: NDArray[np.float32], view: View, scale: tuple[float, float]) -> tuple[Tensor, tuple[int, int]]:
    """As `crop_resize_values`, but height and width are scaled by `scale`, then cut out, or padded with 0.

    So a pixel of the sample is of the same size in the world, whatever the size of the image.
    """
    sides = scaled_sides((values.shape[1], values.shape[2]), scale)
    whole = np.stack([np.asarray(Image.fromarray(one).resize(sides[::-1], Image.Resampling.LANCZOS)) for one in values])
    missing = [max(want - have, 0) for have, want in zip(sides, view.sides, strict=True)]
    whole = np.pad(whole, ((0, 0), *((total // 2, total - total // 2) for total in missing)))
    slack = [have - want for have, want in zip(whole.shape[1:], view.sides, strict=True)]
    if view.offset is None:
        top, left = (room // 2 for room in slack)
    else:
        top, left = view.offset % (slack[0] + 1), view.offset // (slack[0] + 1) % (slack[1] + 1)
    pixels = _to_tensor(whole[:, top : top + view.sides[0], left : left + view.sides[1]], view)
    return pixels, (top, slack[1] - left if view.flip else left)


def scaled_sides(size: Sides, scale: tuple[float, float]) -> Sides:
    """Height and width after scaling, in whole pixels."""
    return max(1, round(size[0] * scale[0])), max(1, round(size[1] * scale[1]))


def _to_tensor(values: NDArray[np.float32], view: View) -> Tensor:
    """Values in [0, 1] as pixels in [-1, 1]; the filter may have gone beyond."""
    pixels = torch.from_numpy(values * 2 - 1).clamp_(-1, 1)
    return pixels.flip(-1) if view.flip else pixels


def _crop_resize(image: Image.Image, view: View) -> tuple[Image.Image, tuple[int, int]]:
    """The crop of a view, resized but not mirrored; and its top and left at its scale, as it is seen mirrored."""
    height, width = view.sides
    left, top, crop_width, crop_height = crop_box((image.height, image.width), view)
    shown_left = float(image.width - crop_width - left if view.flip else left)
    corner = round(top * height / crop_height), round(shown_left * height / crop_height)
    if image.size != (width, height):
        edges = (left, top, left + crop_width, top + crop_height)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=edges)
    return image, corner
