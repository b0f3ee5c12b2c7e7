"""TODO."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from tyro.conf import arg

from ldm.config import Config

if TYPE_CHECKING:
    pass


class DataConfig(Config):
    """Which images, and how they are cut."""

    source: str = "shapes"
    """shapes, pairs, emoji, a folder, a parquet file, the id `org/name` of a hub data set, or tar and parquet shards: a
    folder of them, a pattern such as `photos/{000..099}.tar`, an address such as `s3://bucket/photos`"""
    resolution: int = Field(32, ge=8)
    """side of the square images, in pixels"""
    bucket_step: int = Field(0, ge=0)
    """0: squares; else training images keep about their shape, with sides that are multiples of this and an area of
    about size x size, and each step takes images of one shape"""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey"""
    random_flip: bool = False
    """mirror every second training image at random; off because it also mirrors writing, left and right"""
    shard_streams: int = Field(16, ge=1)
    """shards that a step takes images of; three times as many are kept on each machine"""
    emoji_font: Annotated[Path | None, arg(aliases=["--font"])] = None
    """colour-emoji font file for source emoji; found by itself when left out"""
    max_unreadable: float = Field(0.01, ge=0, le=1)
    """share of images that may be unreadable, each replaced by another one, before training stops"""

    def check_buckets(self, factor: int) -> None:
        """ValueError unless networks that divide each side by `factor` can take all buckets."""
        if self.bucket_step % factor:
            raise ValueError(
                f"data.bucket_step {self.bucket_step} is not a multiple of {factor}, by which the networks divide sides"
            )

    def check_channels(self, wanted: int) -> None:
        """ValueError unless images have the channels that a VAE wants."""
        if self.channels != wanted:
            raise ValueError(
                f"data.channels is {self.channels}, the VAE wants {wanted}: --data.channels {wanted}, "
                f"or a VAE that was trained with --vae.image-channels {self.channels}"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples, which a resumed run must not change."""
        return self.model_dump(mode="json", exclude={"max_unreadable"})
