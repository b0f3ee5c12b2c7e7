"""Generate images from prompts: numbered PNGs, each with what is needed to generate it again, and a grid."""

from collections.abc import Sequence

from ldm.cli import run
from ldm.pipeline.generate import Txt2ImgConfig, generate


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(Txt2ImgConfig, generate, argv, description=__doc__)


if __name__ == "__main__":
    main()
