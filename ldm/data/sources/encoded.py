"""Sources of 8-bit image files: PNG, JPEG and WEBP, decoded and resized in 8 bits."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ldm.data.sources.base import Decoded, ImageTextSource
from ldm.data.transforms import Sides, View, crop_resize_to_tensor
from ldm.imaging import Encoded, decode_reduced, image_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


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
        except ValueError:  # a row without an image
            return 1, 1
