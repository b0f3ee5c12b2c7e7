"""Generate images from an image: change it, fill what a mask covers, or continue it beyond its edges."""

from collections.abc import Sequence

from ldm.cli import run
from ldm.pipeline.generate import Img2ImgConfig, generate_from_image


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(Img2ImgConfig, generate_from_image, argv, description=__doc__)


if __name__ == "__main__":
    main()
