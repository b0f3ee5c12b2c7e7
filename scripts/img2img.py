"""Paint from a picture: change it, fill what a mask covers, or continue it beyond its edges."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from txt2img import Txt2ImgConfig, generate

from ldm.cli import exit_on_user_error, parse_cli
from ldm.io.tensors import sha256
from ldm.pipeline.record import InitImageRecord


class Img2ImgConfig(Txt2ImgConfig):
    """Settings of img2img."""

    image: Path | None = None
    """the picture to start from"""
    strength: float = Field(0.75, ge=0, le=1)
    """how much of it is painted anew; 1 under a mask forgets what was there"""
    mask: Path | None = None
    """a picture of the same size: what is white is painted, what is black stays"""
    inversion_prompt: str | None = None
    """a prompt that describes the picture: start from the noise that makes it, found by DDIM, instead of the seed's"""
    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
    """pixels to paint beyond the left, top, right and bottom edge"""


def init_image_record(config: Img2ImgConfig) -> InitImageRecord:
    """What the flags say of the picture; ValueError when there is none."""
    for name, path in (("image", config.image), ("mask", config.mask)):
        if path is not None and not path.is_file():
            raise ValueError(f"{name} {path} does not exist")
    if config.image is None:
        raise ValueError("no picture: name one with --image, or paint from a prompt alone with txt2img.py")
    return InitImageRecord(
        image=str(config.image),
        image_hash=sha256(config.image),
        strength=config.strength,
        mask=config.mask and str(config.mask),
        mask_hash=config.mask and sha256(config.mask),
        inversion_prompt=config.inversion_prompt,
        outpaint=config.outpaint,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    config = parse_cli(Img2ImgConfig, argv, default=None, description=__doc__)
    with exit_on_user_error():
        generate(config, None if config.reproduce else init_image_record(config))


if __name__ == "__main__":
    main()
