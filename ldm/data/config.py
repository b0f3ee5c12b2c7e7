"""Which images are read, and how they are cropped: `DataConfig`."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ldm.config import Config
from ldm.data.loader import Batch

# Values of `DataConfig.source`; all others are images of one's own.
DRAWN_SOURCES = ("shapes", "pairs", "characters", "emoji", "phantom")


class DataConfig(Config):
    """Which images are read, and how they are cropped."""

    source: str = "shapes"
    """shapes, pairs, characters, emoji, or several of these, as `characters+emoji`; phantom, slices of drawn heads; a
    folder of images or of medical files (DICOM, NIfTI, PNG and TIFF of 16 bits), a parquet file, the id `org/name` of
    a hub data set, or tar and parquet shards: a folder of them, a pattern such as `photos/{000..099}.tar`, an address
    such as `s3://bucket/photos`"""
    resolution: int = Field(32, ge=8)
    """side of the square images, in pixels"""
    bucket_step: int = Field(0, ge=0)
    """0: squares; else training images keep about their shape, with sides that are multiples of this and an area of
    about resolution x resolution, and all images of a step have one shape"""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey"""
    window: str = "percentile"
    """of medical images, the values from black to white: brain, lung, bone or soft-tissue for CT; file, as the file
    says; percentile, 0.5 to 99.5 % of a series; or centre and width, as 40,80. Three make channels: brain+bone+lung"""
    spacing: float | None = Field(None, gt=0)
    """of medical images, mm that a pixel is wide and high: images are resampled to it, then cropped, not resized"""
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    """of the slices of NIfTI volumes"""
    caption_template: str = ""
    """captions of DICOM images that no table has one for, as `{Modality} of the {BodyPartExamined}`"""
    random_flip: bool = False
    """mirror every second training image at random; off because it also mirrors writing, left and right"""
    shard_streams: int = Field(16, ge=1)
    """shards that a step takes images of; three times as many are cached on each machine"""
    emoji_font: Path | None = None
    """colour-emoji font for sources characters and emoji: a file, or the name of one in the system's font folders; when
    left out, OpenMoji's for characters, and for emoji the system's, or OpenMoji's where it has none"""
    max_unreadable: float = Field(0.01, ge=0, le=1)
    """fraction of the images that may be unreadable, each replaced by another one, before training stops"""

    def check_buckets(self, factor: int) -> None:
        """ValueError unless networks that divide each side by `factor` accept all buckets."""
        if self.bucket_step % factor:
            raise ValueError(f"data.bucket_step {self.bucket_step}: choose a multiple of the networks' factor {factor}")

    def check_channels(self, expected: int) -> None:
        """ValueError unless images have the channels that a VAE expects."""
        if self.channels != expected:
            raise ValueError(
                f"data.channels is {self.channels}, the VAE expects {expected}: pass --data.channels {expected}, "
                f"or a VAE that was trained with --vae.image-channels {self.channels}"
            )

    def example_batch(self, count: int) -> Batch:
        """A batch of random images, as the data set would give it."""
        images = torch.rand(count, self.channels, self.resolution, self.resolution) * 2 - 1
        sizes = torch.tensor([self.resolution, self.resolution, 0, 0, self.resolution, self.resolution])
        return {"image": images, "sizes": sizes.expand(count, -1), "caption": ["an image"] * count}

    @property
    def drawn(self) -> str | None:
        """The set that is drawn here, or several, if it is one."""
        return self.source if set(self.source.split("+")) <= set(DRAWN_SOURCES) else None

    def fingerprint(self) -> dict[str, Any]:
        """What decides how samples are made of their images, wherever these are stored; a resumed run has the same."""
        values = self.model_dump(mode="json", exclude={"source", "max_unreadable"})
        return {**values, "drawn_source": self.drawn, "emoji_font": self.emoji_font and self.emoji_font.name}
