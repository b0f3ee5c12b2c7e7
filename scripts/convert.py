"""Convert a model from one format into another; both must generate the same image, or nothing is written."""

from collections.abc import Sequence

from ldm.cli import run
from ldm.pipeline.convert import ConvertConfig, convert


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run(ConvertConfig, convert, argv, description=__doc__)


if __name__ == "__main__":
    main()
